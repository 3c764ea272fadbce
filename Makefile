# make demo: train on synthetic images and measure the checkpoint.   make test: linter and tests.
# Both create .venv first, where it is missing or older than the requirements.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: .venv/ready
	rm -rf output/demo
	$(BIN)/python MIX_KL_CIFAR10.py --synthetic --run-name demo --width 8 --epochs 5 --held-out 200 \
		--batch-size 64 --lr-schedule cyclic --lr-peak 0.4 --kl-weight 1
	$(BIN)/python test_cifar10.py --synthetic --model_path output/demo/final_model.pth \
		--out_dir output/demo --n-examples 250
	@echo "curves: output/demo/curves.png"

test: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt requirements-eval.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q -r requirements-eval.txt
	touch $@

clean:
	rm -rf .venv output/demo .pytest_cache .ruff_cache
