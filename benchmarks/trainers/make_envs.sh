#!/bin/sh
# An environment a trainer, in benchmarks/.envs/NAME: benchmarks/trainers/make_envs.sh [trl] [llama-factory] [axolotl]
# Each beside the torch of constraints.txt; one that is ready is left as it is.
cd "$(dirname "$0")/../.." || exit 1
PYTHON=${PYTHON:-python3}
TORCH=$(grep '^torch==' constraints.txt)

# without torchvision and torchaudio, whose wheels want another build of torch; what of them is imported is a stub
FACTORY="transformers==5.6.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 trl==0.24.0 tyro<0.9 omegaconf av==16.0.0
gradio<=5.50.0 torchdata==0.11.0 einops fire hf-transfer matplotlib modelscope sentencepiece tiktoken uvicorn fastapi
sse-starlette protobuf scipy pandas numpy"
# without what needs a GPU (xformers, liger-kernel, flash-linear-attention) or a cloud
AXOLOTL="transformers==5.16.1 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 huggingface_hub==1.17.0
tokenizers==0.23.1 packaging==26.0 pydantic==2.12.5 addict fire einops colorama numba<1.0,>=0.63.1 typer==0.25.1
evaluate==0.4.1 art python-dotenv==1.0.1 zstandard==0.22.0 fastcore schedulefree==1.4.1 posthog==6.7.11
mistral-common==1.11.5 sentencepiece kernels<0.17,>=0.16 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6
nvidia-ml-py==12.560.30 scipy requests PyYAML==6.0.3 wandb optimum==1.16.2 trackio==0.19.0"

for name in ${*:-trl llama-factory axolotl}; do
    env=benchmarks/.envs/$name
    test -e "$env/ready" && continue
    rm -rf "$env" && mkdir -p "$env"
    (
        set -e
        "$PYTHON" -m venv "$env"
        pip="$env/bin/python -m pip install --disable-pip-version-check"
        case $name in
        trl) $pip "$TORCH" trl==1.16.0 peft==0.21.2 ;;
        llama-factory)
            $pip "$TORCH" $FACTORY && $pip --no-deps llamafactory==0.9.5
            touch "$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio.py"
            ;;
        axolotl) $pip "$TORCH" $AXOLOTL && $pip --no-deps axolotl==0.19.0 bitsandbytes==0.50.2 triton torchao==0.17.0 ;;
        *) echo "no such trainer: $name" && exit 1 ;;
        esac
    ) >"$env.log" 2>&1 && touch "$env/ready"
    tail -n 1 "$env.log"
done
