"""Why each request went where it went: as a response header, in a ring, and over HTTP."""
