#!/bin/sh
# An environment a library for benchmarks/scoring.py, this package beside it: benchmarks/make_envs.sh [NAME ...]
# Each leaves benchmarks/.envs/NAME/ready, or benchmarks/.envs/NAME.log that ends with the reason why not.
# Where torch would come as a CUDA build, have pip prefer a CPU one first: the versions are those of constraints.txt.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}

# bergson also asks for torchvision and torchaudio, which nothing here imports and whose wheels want another build of torch
BERGSON="accelerate datasets jinja2 jaxtyping ml_dtypes natsort peft petname pyyaml scipy simple-parsing torchopt bitsandbytes"

for name in ${*:-opacus bergson dattri}; do
    env=benchmarks/.envs/$name
    rm -rf "$env" && mkdir -p "$env"
    (
        set -e
        "$PYTHON" -m venv "$env"
        pip="$env/bin/python -m pip install --disable-pip-version-check -c constraints.txt"
        $pip -e '.[gguf]'
        case $name in
        opacus) $pip opacus==1.6.0 ;;
        bergson) $pip $BERGSON && $pip --no-deps bergson==2.5.1 ;;
        dattri) $pip dattri==0.3.0 ;;
        *) echo "no such library: $name" && exit 1 ;;
        esac
        "$env/bin/python" -c "import $name, staff, torch; print('$name beside torch', torch.__version__)"
    ) >"$env.log" 2>&1 && touch "$env/ready"
    tail -n 1 "$env.log"
done
