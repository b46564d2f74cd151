# What every step of a run finds around it. To be sourced after `begin`.
site=$scratch/site # wheels that the image lacks
# This tree before whatever is installed; nothing from a hub; compilations kept for the next step.
export PYTHONPATH=$PWD:$PWD/kernels:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
export HF_HOME=$scratch/huggingface HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export TOKENIZERS_PARALLELISM=false
for tools in /usr/local/cuda*/bin /opt/nvidia/nsight-compute/*; do # ncu, compute-sanitizer
    PATH=$PATH:$tools
done
if [ -n "$DRY" ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
elif [ -z "$LIST" ] &&
    ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device; --dry rehearses without one" >&2
    exit 2
fi
