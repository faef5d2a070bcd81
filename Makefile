PYTHON ?= python3
BIN := .venv/bin

.PHONY: bench checkpoints demo docs gallery test lint clean

# Trains on the embedded images and writes the results into demo/.
demo: .venv/.installed
	$(BIN)/python training/demo.py

# Times this package against its rivals and a step against that of an earlier commit; docs/performance.md says more.
AGAINST ?= HEAD~1
bench: .venv/.installed
	$(BIN)/python benchmarks/bench.py $(BENCH)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step_times.py --repeats 9 --against $(AGAINST)

# Copies the present code into the published models of checkpoints/; their weights stay.
checkpoints: .venv/.installed
	$(BIN)/python checkpoints/regenerate.py

# The pictures of docs/gallery.md and README, of published models; CIFAR10 may be a local copy.
CIFAR10 ?= uoft-cs/cifar10
gallery: .venv/.installed
	$(BIN)/ctrl-csc inspect --model checkpoints/ctrl-csc-cifar10 --image checkpoints/ctrl-csc-cifar10/examples/1.png \
	    --dataset_name $(CIFAR10) --num_images 1000 --output docs/gallery
	$(BIN)/ctrl-csc reconstruct spaces/ctrl-csc/photograph.jpg --model checkpoints/ctrl-csc-tiny-imagenet --tiles \
	    --output docs/photograph.png

# The pages of the site, into site/index.html.
docs: .venv/.installed
	$(BIN)/mkdocs build --strict

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; choose it with PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo build dist site .mypy_cache .pytest_cache .ruff_cache
