# Engines, one command per process. In the job, agents fill these variables in:
#   ADDRESS       this node's address that the other nodes reach
#   …_PORT        ports bound on this node
#   SCRATCH       private directory on this node
#   transport variables (UCX_NET_DEVICES, …) found on the node are added
#   VLLM_API_KEY  the job key, from secrets/job-key
# In the job they run in the site's container (pyxis, /images/hpcserve.sqsh).
PYTHON=python3

# prefill-0 on node 0, slots 0
env \
  CUDA_VISIBLE_DEVICES=0 \
  "FLASHINFER_WORKSPACE_BASE=$SCRATCH" \
  HF_HUB_OFFLINE=1 \
  PYTHONUNBUFFERED=1 \
  "TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor" \
  "TRITON_CACHE_DIR=$SCRATCH/triton" \
  UCX_CUDA_IPC_ENABLE_MNNVL=n \
  UCX_MEMTYPE_CACHE=n \
  UCX_TLS=rc,dc,ud,cuda_copy,cuda_ipc,tcp \
  "VLLM_CACHE_ROOT=$SCRATCH/vllm" \
  "VLLM_HOST_IP=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_HOST=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_PORT=$SIDE_CHANNEL_PORT" \
  VLLM_NO_USAGE_STATS=1 \
  "$PYTHON" -m vllm.entrypoints.openai.api_server \
    --model /models/Llama-3.1-8B-Instruct \
    --served-model-name Llama-3.1-8B-Instruct \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 32768 \
    --tensor-parallel-size 1 \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30}}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15

# prefill-1 on node 0, slots 1
env \
  CUDA_VISIBLE_DEVICES=1 \
  "FLASHINFER_WORKSPACE_BASE=$SCRATCH" \
  HF_HUB_OFFLINE=1 \
  PYTHONUNBUFFERED=1 \
  "TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor" \
  "TRITON_CACHE_DIR=$SCRATCH/triton" \
  UCX_CUDA_IPC_ENABLE_MNNVL=n \
  UCX_MEMTYPE_CACHE=n \
  UCX_TLS=rc,dc,ud,cuda_copy,cuda_ipc,tcp \
  "VLLM_CACHE_ROOT=$SCRATCH/vllm" \
  "VLLM_HOST_IP=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_HOST=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_PORT=$SIDE_CHANNEL_PORT" \
  VLLM_NO_USAGE_STATS=1 \
  "$PYTHON" -m vllm.entrypoints.openai.api_server \
    --model /models/Llama-3.1-8B-Instruct \
    --served-model-name Llama-3.1-8B-Instruct \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 32768 \
    --tensor-parallel-size 1 \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30}}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15

# prefill-2 on node 0, slots 2
env \
  CUDA_VISIBLE_DEVICES=2 \
  "FLASHINFER_WORKSPACE_BASE=$SCRATCH" \
  HF_HUB_OFFLINE=1 \
  PYTHONUNBUFFERED=1 \
  "TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor" \
  "TRITON_CACHE_DIR=$SCRATCH/triton" \
  UCX_CUDA_IPC_ENABLE_MNNVL=n \
  UCX_MEMTYPE_CACHE=n \
  UCX_TLS=rc,dc,ud,cuda_copy,cuda_ipc,tcp \
  "VLLM_CACHE_ROOT=$SCRATCH/vllm" \
  "VLLM_HOST_IP=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_HOST=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_PORT=$SIDE_CHANNEL_PORT" \
  VLLM_NO_USAGE_STATS=1 \
  "$PYTHON" -m vllm.entrypoints.openai.api_server \
    --model /models/Llama-3.1-8B-Instruct \
    --served-model-name Llama-3.1-8B-Instruct \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 32768 \
    --tensor-parallel-size 1 \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30}}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15

# prefill-3 on node 0, slots 3
env \
  CUDA_VISIBLE_DEVICES=3 \
  "FLASHINFER_WORKSPACE_BASE=$SCRATCH" \
  HF_HUB_OFFLINE=1 \
  PYTHONUNBUFFERED=1 \
  "TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor" \
  "TRITON_CACHE_DIR=$SCRATCH/triton" \
  UCX_CUDA_IPC_ENABLE_MNNVL=n \
  UCX_MEMTYPE_CACHE=n \
  UCX_TLS=rc,dc,ud,cuda_copy,cuda_ipc,tcp \
  "VLLM_CACHE_ROOT=$SCRATCH/vllm" \
  "VLLM_HOST_IP=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_HOST=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_PORT=$SIDE_CHANNEL_PORT" \
  VLLM_NO_USAGE_STATS=1 \
  "$PYTHON" -m vllm.entrypoints.openai.api_server \
    --model /models/Llama-3.1-8B-Instruct \
    --served-model-name Llama-3.1-8B-Instruct \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 32768 \
    --tensor-parallel-size 1 \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30}}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15

# decode-0 on node 0, slots 4
env \
  CUDA_VISIBLE_DEVICES=4 \
  "FLASHINFER_WORKSPACE_BASE=$SCRATCH" \
  HF_HUB_OFFLINE=1 \
  PYTHONUNBUFFERED=1 \
  "TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor" \
  "TRITON_CACHE_DIR=$SCRATCH/triton" \
  UCX_CUDA_IPC_ENABLE_MNNVL=n \
  UCX_MEMTYPE_CACHE=n \
  UCX_TLS=rc,dc,ud,cuda_copy,cuda_ipc,tcp \
  "VLLM_CACHE_ROOT=$SCRATCH/vllm" \
  "VLLM_HOST_IP=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_HOST=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_PORT=$SIDE_CHANNEL_PORT" \
  VLLM_NO_USAGE_STATS=1 \
  "$PYTHON" -m vllm.entrypoints.openai.api_server \
    --model /models/Llama-3.1-8B-Instruct \
    --served-model-name Llama-3.1-8B-Instruct \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 32768 \
    --tensor-parallel-size 1 \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_consumer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30},"kv_load_failure_policy":"recompute"}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15

# decode-1 on node 0, slots 5
env \
  CUDA_VISIBLE_DEVICES=5 \
  "FLASHINFER_WORKSPACE_BASE=$SCRATCH" \
  HF_HUB_OFFLINE=1 \
  PYTHONUNBUFFERED=1 \
  "TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor" \
  "TRITON_CACHE_DIR=$SCRATCH/triton" \
  UCX_CUDA_IPC_ENABLE_MNNVL=n \
  UCX_MEMTYPE_CACHE=n \
  UCX_TLS=rc,dc,ud,cuda_copy,cuda_ipc,tcp \
  "VLLM_CACHE_ROOT=$SCRATCH/vllm" \
  "VLLM_HOST_IP=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_HOST=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_PORT=$SIDE_CHANNEL_PORT" \
  VLLM_NO_USAGE_STATS=1 \
  "$PYTHON" -m vllm.entrypoints.openai.api_server \
    --model /models/Llama-3.1-8B-Instruct \
    --served-model-name Llama-3.1-8B-Instruct \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 32768 \
    --tensor-parallel-size 1 \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_consumer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30},"kv_load_failure_policy":"recompute"}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15

# decode-2 on node 0, slots 6
env \
  CUDA_VISIBLE_DEVICES=6 \
  "FLASHINFER_WORKSPACE_BASE=$SCRATCH" \
  HF_HUB_OFFLINE=1 \
  PYTHONUNBUFFERED=1 \
  "TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor" \
  "TRITON_CACHE_DIR=$SCRATCH/triton" \
  UCX_CUDA_IPC_ENABLE_MNNVL=n \
  UCX_MEMTYPE_CACHE=n \
  UCX_TLS=rc,dc,ud,cuda_copy,cuda_ipc,tcp \
  "VLLM_CACHE_ROOT=$SCRATCH/vllm" \
  "VLLM_HOST_IP=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_HOST=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_PORT=$SIDE_CHANNEL_PORT" \
  VLLM_NO_USAGE_STATS=1 \
  "$PYTHON" -m vllm.entrypoints.openai.api_server \
    --model /models/Llama-3.1-8B-Instruct \
    --served-model-name Llama-3.1-8B-Instruct \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 32768 \
    --tensor-parallel-size 1 \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_consumer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30},"kv_load_failure_policy":"recompute"}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15

# decode-3 on node 0, slots 7
env \
  CUDA_VISIBLE_DEVICES=7 \
  "FLASHINFER_WORKSPACE_BASE=$SCRATCH" \
  HF_HUB_OFFLINE=1 \
  PYTHONUNBUFFERED=1 \
  "TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor" \
  "TRITON_CACHE_DIR=$SCRATCH/triton" \
  UCX_CUDA_IPC_ENABLE_MNNVL=n \
  UCX_MEMTYPE_CACHE=n \
  UCX_TLS=rc,dc,ud,cuda_copy,cuda_ipc,tcp \
  "VLLM_CACHE_ROOT=$SCRATCH/vllm" \
  "VLLM_HOST_IP=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_HOST=$ADDRESS" \
  "VLLM_NIXL_SIDE_CHANNEL_PORT=$SIDE_CHANNEL_PORT" \
  VLLM_NO_USAGE_STATS=1 \
  "$PYTHON" -m vllm.entrypoints.openai.api_server \
    --model /models/Llama-3.1-8B-Instruct \
    --served-model-name Llama-3.1-8B-Instruct \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 32768 \
    --tensor-parallel-size 1 \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_consumer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30},"kv_load_failure_policy":"recompute"}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15
