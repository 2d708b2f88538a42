#!/usr/bin/env bash
# Wheels for a GPU machine that reaches no network but has Python 3.12, PyTorch, Triton and transformers.
#
#   bash bench/gpu/wheels.sh FOLDER          here: the package, and what it needs beside those
#   bash bench/gpu/wheels.sh FOLDER --vllm   here: vLLM for CUDA as well, in two parts of less than 64 MiB
#   . bench/gpu/unpack.sh FOLDER             there, in the root of the repository: ready for `python -m bench.gpu.day`
#
# vLLM 0.25.1's build for CUDA is the one that wants PyTorch 2.11. Of it is packed what a dense model on Hopper calls:
# FlashAttention 2, the kernels of mixtures and the server stay behind.
set -euo pipefail
case "${1--} ${2-}" in
  -*) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  *" " | *" --vllm") ;;
  *) echo "wheels.sh: $2 is no option; there is --vllm" >&2; exit 2 ;;
esac
for tool in unzip xz; do
  [ -z "${2-}" ] || command -v $tool > /dev/null || { echo "wheels.sh: $tool is not installed" >&2; exit 1; }
done
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."

download() {
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    $(printf -- '--platform manylinux_2_%s_x86_64 ' 39 35 34 31 28 27 24 17 12) \
    --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 -d "$@"
}

mkdir -p "$folder/wheels"
rm -f "$folder"/wheels/*.whl
download "$folder/wheels" pydantic==2.14.3 pydantic_core==2.50.4 typing-inspection annotated-types dill
python3 -m pip wheel -q --no-deps -w "$folder/wheels" .
[ "${2-}" = --vllm ] || exit 0

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$folder/vllm-a" "$folder/vllm-b/wheels"
download "$scratch" vllm==0.25.1
library=vllm/_C_stable_libtorch.abi3.so
unzip -q "$scratch"/vllm-*.whl -d "$scratch/site" -x '*_vllm_fa2_C*' '*vllm-rs' '*_moe_C_stable*' \
  'vllm/third_party/fmha_sm100/*' 'vllm/third_party/deep_gemm/include/*'
xz -6 -c "$scratch/site/$library" > "$folder/vllm-a/library.xz"
rm "$scratch/site/$library"
tar -C "$scratch/site" -cJf "$folder/vllm-b/rest.tar.xz" .
download "$folder/vllm-b/wheels" apache-tvm-ffi==0.1.15.post2 cachetools==8.0.2 cbor2==6.3.0 email-validator \
  fastapi==0.136.3 httpx2==2.16.2 jsonschema jsonschema-specifications llguidance==1.7.6 more-itertools msgspec \
  openai==3.57.0 openai-harmony==0.0.8 partial-json-parser pybase64 pydantic-extra-types python-multipart pytz pyzmq \
  referencing rpds-py setuptools==77.0.3 sniffio starlette xgrammar==0.2.8
du -sh "$folder"/*
