"""The meeting of all ranks before any engine starts: over MPI, TCP or the shared file system."""
