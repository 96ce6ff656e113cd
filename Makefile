# Every target sets itself up: the first call makes .venv and installs requirements.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench clean

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Align the embedded world's base model four ways and measure what changed.
demo: .venv/ready
	@for method in sft dpo pointwise_dpo ulma; do \
	  rm -rf runs/demo/$$method && \
	  $(BIN)/python train.py --method $$method --output_dir runs/demo/$$method || exit; \
	done
	$(BIN)/python eval.py runs/demo/sft runs/demo/dpo runs/demo/pointwise_dpo runs/demo/ulma \
	  --json runs/demo/table.json
	@echo "Files: runs/demo/METHOD/final (PEFT adapter), runs/demo/METHOD/metrics.jsonl,"
	@echo "       runs/demo/table.json, runs/world-*/ (base model, tokenizer, data)"

test: .venv/ready
	$(BIN)/python -m pytest tests

# One LoRA step against TRL + PEFT on the same pairs; needs an HH file and a Llama tokenizer.
HH ?= ../shared/data/hh_harmless_base_test/test.jsonl.gz
TOKENIZER ?= ../shared/data/llama2_tokenizer/tokenizer.model

.venv-bench/ready: requirements.txt bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	touch $@

bench: .venv-bench/ready
	.venv-bench/bin/python bench/step.py --dataset $(HH) --tokenizer $(TOKENIZER) \
	  --precision fp32 --out bench/results/step.json

clean:
	rm -rf .venv .venv-bench runs
