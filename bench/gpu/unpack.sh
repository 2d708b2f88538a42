# To be sourced on a GPU machine that reaches no network: `. bench/gpu/unpack.sh FOLDER`, with what `wheels.sh` has put
# there. Where parts of vLLM are carried one after another, each call unpacks what has come and leaves the rest.
site=${TMPDIR:-/tmp}/estune-site
[ -d "$1/wheels" ] &&
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$1"/wheels/*.whl
if [ -f "$1/vllm-a/library.xz" ]; then
  mkdir -p "$site/vllm"
  xz -dc "$1/vllm-a/library.xz" > "$site/vllm/_C_stable_libtorch.abi3.so"
fi
if [ -f "$1/vllm-b/rest.tar.xz" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$1"/vllm-b/wheels/*.whl
  tar -C "$site" -xJf "$1/vllm-b/rest.tar.xz"
fi
export PYTHONPATH=$site:$PWD PATH=$site/bin:$PATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
