# Engines, one command per process. In the job, agents fill these variables in:
#   ADDRESS       this node's address that the other nodes reach
#   …_PORT        ports bound on this node
#   SCRATCH       private directory on this node
#   transport variables (UCX_NET_DEVICES, …) found on the node are added
#   VLLM_API_KEY  the job key, from secrets/job-key
# In the job they run in the site's container (pyxis, /images/hpcserve.sqsh).
PYTHON=python3

# prefill-0 on node 0, slots 0,1,2,3,4,5,6,7
env \
  CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
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
    --model /models/DeepSeek-R1 \
    --served-model-name DeepSeek-R1 \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 65536 \
    --tensor-parallel-size 1 \
    --data-parallel-size 32 \
    --enable-expert-parallel \
    --nnodes 4 \
    --node-rank 0 \
    --master-addr "$ADDRESS" \
    --master-port "$MASTER_PORT" \
    --data-parallel-address "$ADDRESS" \
    --data-parallel-rpc-port "$DP_RPC_PORT" \
    --data-parallel-hybrid-lb \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30}}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15 \
    --all2all-backend deepep_high_throughput \
    --max-num-batched-tokens 8192

# prefill-0 on node 1, slots 0,1,2,3,4,5,6,7
env \
  CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
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
    --model /models/DeepSeek-R1 \
    --served-model-name DeepSeek-R1 \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 65536 \
    --tensor-parallel-size 1 \
    --data-parallel-size 32 \
    --enable-expert-parallel \
    --nnodes 4 \
    --node-rank 1 \
    --master-addr "$HEAD_ADDRESS" \
    --master-port "$MASTER_PORT" \
    --data-parallel-address "$HEAD_ADDRESS" \
    --data-parallel-rpc-port "$DP_RPC_PORT" \
    --data-parallel-hybrid-lb \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30}}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15 \
    --all2all-backend deepep_high_throughput \
    --max-num-batched-tokens 8192

# prefill-0 on node 2, slots 0,1,2,3,4,5,6,7
env \
  CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
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
    --model /models/DeepSeek-R1 \
    --served-model-name DeepSeek-R1 \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 65536 \
    --tensor-parallel-size 1 \
    --data-parallel-size 32 \
    --enable-expert-parallel \
    --nnodes 4 \
    --node-rank 2 \
    --master-addr "$HEAD_ADDRESS" \
    --master-port "$MASTER_PORT" \
    --data-parallel-address "$HEAD_ADDRESS" \
    --data-parallel-rpc-port "$DP_RPC_PORT" \
    --data-parallel-hybrid-lb \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30}}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15 \
    --all2all-backend deepep_high_throughput \
    --max-num-batched-tokens 8192

# prefill-0 on node 3, slots 0,1,2,3,4,5,6,7
env \
  CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
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
    --model /models/DeepSeek-R1 \
    --served-model-name DeepSeek-R1 \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 65536 \
    --tensor-parallel-size 1 \
    --data-parallel-size 32 \
    --enable-expert-parallel \
    --nnodes 4 \
    --node-rank 3 \
    --master-addr "$HEAD_ADDRESS" \
    --master-port "$MASTER_PORT" \
    --data-parallel-address "$HEAD_ADDRESS" \
    --data-parallel-rpc-port "$DP_RPC_PORT" \
    --data-parallel-hybrid-lb \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_producer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30}}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15 \
    --all2all-backend deepep_high_throughput \
    --max-num-batched-tokens 8192

# decode-0 on node 4, slots 0,1,2,3,4,5,6,7
env \
  CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
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
    --model /models/DeepSeek-R1 \
    --served-model-name DeepSeek-R1 \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 65536 \
    --tensor-parallel-size 1 \
    --data-parallel-size 32 \
    --enable-expert-parallel \
    --nnodes 4 \
    --node-rank 0 \
    --master-addr "$ADDRESS" \
    --master-port "$MASTER_PORT" \
    --data-parallel-address "$ADDRESS" \
    --data-parallel-rpc-port "$DP_RPC_PORT" \
    --data-parallel-hybrid-lb \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_consumer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30},"kv_load_failure_policy":"recompute"}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15 \
    --all2all-backend deepep_low_latency \
    --max-num-batched-tokens 256 \
    --max-num-seqs 128

# decode-0 on node 5, slots 0,1,2,3,4,5,6,7
env \
  CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
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
    --model /models/DeepSeek-R1 \
    --served-model-name DeepSeek-R1 \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 65536 \
    --tensor-parallel-size 1 \
    --data-parallel-size 32 \
    --enable-expert-parallel \
    --nnodes 4 \
    --node-rank 1 \
    --master-addr "$HEAD_ADDRESS" \
    --master-port "$MASTER_PORT" \
    --data-parallel-address "$HEAD_ADDRESS" \
    --data-parallel-rpc-port "$DP_RPC_PORT" \
    --data-parallel-hybrid-lb \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_consumer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30},"kv_load_failure_policy":"recompute"}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15 \
    --all2all-backend deepep_low_latency \
    --max-num-batched-tokens 256 \
    --max-num-seqs 128

# decode-0 on node 6, slots 0,1,2,3,4,5,6,7
env \
  CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
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
    --model /models/DeepSeek-R1 \
    --served-model-name DeepSeek-R1 \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 65536 \
    --tensor-parallel-size 1 \
    --data-parallel-size 32 \
    --enable-expert-parallel \
    --nnodes 4 \
    --node-rank 2 \
    --master-addr "$HEAD_ADDRESS" \
    --master-port "$MASTER_PORT" \
    --data-parallel-address "$HEAD_ADDRESS" \
    --data-parallel-rpc-port "$DP_RPC_PORT" \
    --data-parallel-hybrid-lb \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_consumer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30},"kv_load_failure_policy":"recompute"}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15 \
    --all2all-backend deepep_low_latency \
    --max-num-batched-tokens 256 \
    --max-num-seqs 128

# decode-0 on node 7, slots 0,1,2,3,4,5,6,7
env \
  CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
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
    --model /models/DeepSeek-R1 \
    --served-model-name DeepSeek-R1 \
    --host "$ADDRESS" \
    --port "$HTTP_PORT" \
    --middleware hpcserve.engines.vllm_guard.JobKeyGuard \
    --disable-access-log-for-endpoints /health,/metrics \
    --enable-prompt-tokens-details \
    --max-model-len 65536 \
    --tensor-parallel-size 1 \
    --data-parallel-size 32 \
    --enable-expert-parallel \
    --nnodes 4 \
    --node-rank 3 \
    --master-addr "$HEAD_ADDRESS" \
    --master-port "$MASTER_PORT" \
    --data-parallel-address "$HEAD_ADDRESS" \
    --data-parallel-rpc-port "$DP_RPC_PORT" \
    --data-parallel-hybrid-lb \
    --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_consumer","kv_buffer_device":"cuda","kv_connector_extra_config":{"kv_lease_duration":30},"kv_load_failure_policy":"recompute"}' \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"ipc://$SCRATCH/kv.inproc\",\"replay_endpoint\":\"ipc://$SCRATCH/kv-replay.inproc\"}" \
    --shutdown-timeout 15 \
    --all2all-backend deepep_low_latency \
    --max-num-batched-tokens 256 \
    --max-num-seqs 128
