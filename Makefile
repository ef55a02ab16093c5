# make demo   trains with FreezeOut on real images and shows what it saved
# make finetune   fine-tunes a pretrained net: full, full shortened, frozen, and with kept features
# make test   passes the tests
# make simulate   passes the tests that need a GPU on a simulated one
PYTHON ?= python3
INPUTS := scripts/setup_venv.sh pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*)

# .venv is installed without bytecode: the first import of a module writes it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo finetune test simulate lint sanitize clean
.NOTPARALLEL:

demo: .venv/demo-ready
	.venv/bin/freezeout compare --data digits --model wrn-16-1 --epochs 10 --seeds 3 --t0 0.5 --views 2 \
	  --arms full freezeout no-anneal cached short --threads 1 --out demo-run --resume

# Real images that need no download: scikit-learn's digits, at the size that the net needs. 36 steps are 1.7 epochs.
FINETUNE_DATA ?= --data digits
finetune: .venv/finetune-ready
	.venv/bin/freezeout compare $(FINETUNE_DATA) --image-size 64 --model efficientnet-lite0 --weights pretrained --steps 36 \
	  --batch-size 64 --arms full no-anneal cached short --start-frozen _blocks.11 --t0 1 --views 1 --cache-dtype bf16 \
	  --seeds 3 --threads 1 --out finetune-run --resume

test: .venv/test-ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

simulate: .venv/test-ready
	FREEZEOUT_TESTS_CUDA=simulated OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "cuda or native_cuda"
	FREEZEOUT_TESTS_CUDA=simulated FREEZEOUT_TESTS_DEVICE=cuda OMP_NUM_THREADS=1 .venv/bin/python -m pytest \
	  -m "not cuda and not native_cuda" tests/test_freezeout.py tests/test_param_groups.py \
	  tests/test_prefix_prefix.py tests/test_amp.py

lint: .venv/test-ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror csrc/* tests/*.cpp tests/simulated_cuda/*.cpp

# The native tests under AddressSanitizer and UBSan; without what needs nvcc, a clean process or torch.compile.
sanitize: .venv/test-ready
	sh scripts/sanitize.sh -q tests/test_csrc_fused_update.py tests/test_fused_optimizer.py tests/test_fused_sgd.py \
	  tests/test_fused_adamw.py tests/test_fused_random.py \
	  tests/test_prefix_folding.py::test_affine_relu_reads_and_writes_slices \
	  tests/test_prefix_folding.py::test_affine_relu_over_several_threads \
	  -k "not cuda and not on_the_host and not timm and not option_grid"

clean:
	rm -rf .venv build dist demo-run finetune-run *.egg-info freezeout_ext/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/demo-ready: $(INPUTS)
	PYTHON="$(PYTHON)" sh scripts/setup_venv.sh train
	touch $@

.venv/finetune-ready: $(INPUTS)
	PYTHON="$(PYTHON)" sh scripts/setup_venv.sh train,finetune
	touch .venv/demo-ready $@

.venv/test-ready: $(INPUTS)
	PYTHON="$(PYTHON)" sh scripts/setup_venv.sh train,tensorboard,lightning,transformers,dev
	touch .venv/demo-ready $@
