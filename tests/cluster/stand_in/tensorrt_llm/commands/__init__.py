"""The commands of TensorRT-LLM that hpcserve starts."""
