"""The other side of TensorRT-LLM: its workers."""
