# `make reproduce` on a machine with Python 3.11 or newer, make and a network: installs once, then runs every notebook.

PROFILE ?= smoke
PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/.installed
COMMA := ,
ELPV := elpv_dataset-1.0.0.post1-py3-none-any.whl
ELPV_PACKAGE := elpv-dataset==1.0.0.post1

# the notebooks without the cells of one tag, outputs cleared, into runs/
WITHOUT = $(PY) -m nbconvert --to notebook --log-level WARN --output-dir runs/$(2) --ClearOutputPreprocessor.enabled=True \
  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=$(1) notebooks/*.ipynb

# one set, from its archive in ARCHIVES or fetched; one that fails is named in the end, after all others
UNPACK = $(PY) data_scripts/$(1).py $(3) $(if $(ARCHIVES),--archive '$(ARCHIVES)/$(2)') || left="$$left $(1)"

.DEFAULT_GOAL := help
.PHONY: help setup reproduce notebooks students test data bench gpu-check report clean

help:
	@echo "make setup       install everything into .venv (once; again when pyproject.toml or constraints.txt change)"
	@echo "make reproduce   run the notebooks, write runs/PROFILE/index.html; an interrupted call is continued by the same"
	@echo "                   PROFILE=smoke|quick|paper (smoke)  NOTEBOOKS=03,20  MINUTES=30  DEVICE=cpu|cuda  SEEDS=0,1  JOBS=2"
	@echo "make notebooks   run the stored notebooks in place, as they stand, where records or code changed: NOTEBOOKS=03,20"
	@echo "make students    the notebooks with blanks in place of solutions (runs/students), and with them (runs/solutions)"
	@echo "make test        style, tests, and the notebooks once more with nbval"
	@echo "make data        fetch the data sets, or unpack them: ARCHIVES=folder with magnetic-tile.zip, mvtec_metal_nut_512.zip,"
	@echo "                   DeepPCB.tar.xz, NEU-DET.zip, NEU-Seg.zip, AITEX_768.zip, road_rgbd_320.zip,"
	@echo "                   BSData_reduced.zip (the last five cannot be downloaded by a script), and, where it is there,"
	@echo "                   $(ELPV) (pip download --no-deps $(ELPV_PACKAGE))"
	@echo "make bench       time the networks of a study, side by side, on this idle machine: STUDY=yolo_dcf"
	@echo "make gpu-check   train each kind of row for a moment: is the GPU used right, how fast, how much memory"
	@echo "make report      write runs/PROFILE/index.html, results/tables and the verdicts in README.md from the records"
	@echo "make clean       remove runs/smoke and caches; data, weights, quick and paper runs stay"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else 1)' || \
	  { echo "error: '$(PYTHON)' is missing or older than Python 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev,cluster]'
	$(PY) -m ipykernel install --sys-prefix --name python3
	@touch $@

reproduce: $(INSTALLED)
	$(PY) -m defectlab reproduce --profile $(PROFILE) $(if $(NOTEBOOKS),--notebooks $(NOTEBOOKS)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(DEVICE),--device $(DEVICE)) $(if $(SEEDS),--seeds $(SEEDS)) \
	  $(if $(JOBS),--jobs $(JOBS))

notebooks: $(INSTALLED)
	JUPYTER_PATH=.venv/share/jupyter $(PY) -m nbconvert --execute --inplace --coalesce-streams \
	  --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False \
	  $(foreach number,$(or $(subst $(COMMA), ,$(NOTEBOOKS)),*),notebooks/$(number)*.ipynb)

students: $(INSTALLED)
	$(call WITHOUT,solution,students)
	$(call WITHOUT,exercise,solutions)

test: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile
	$(PY) -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks

data: $(INSTALLED)
	@left=; $(call UNPACK,magnetic_tile,magnetic-tile.zip); $(call UNPACK,mvtec_ad,mvtec_metal_nut_512.zip,--category metal_nut); \
	$(call UNPACK,deep_pcb,DeepPCB.tar.xz); $(call UNPACK,neu_det,NEU-DET.zip); $(call UNPACK,neu_seg,NEU-Seg.zip); \
	$(call UNPACK,aitex,AITEX_768.zip); $(call UNPACK,road_depth,road_rgbd_320.zip); $(call UNPACK,bsdata,BSData_reduced.zip); \
	if [ -f '$(or $(ARCHIVES),.)/$(ELPV)' ]; then $(PY) data_scripts/elpv.py --archive '$(or $(ARCHIVES),.)/$(ELPV)' || left="$$left elpv"; \
	else echo "solar cells left out: $(PY) -m pip download --no-deps $(ELPV_PACKAGE) gets $(ELPV) for ARCHIVES"; fi; \
	[ -z "$$left" ] || { echo "make data: not there yet:$$left (above, each says what to do)" >&2; exit 1; }

bench: $(INSTALLED)
	$(PY) -m defectlab bench $(or $(STUDY),yolo_dcf) $(if $(DEVICE),--device $(DEVICE))

gpu-check: $(INSTALLED)
	$(PY) -m defectlab gpu-check $(if $(DEVICE),--device $(DEVICE))

report: $(INSTALLED)
	$(PY) -m defectlab report --profile $(PROFILE)

clean:
	rm -rf runs/smoke .pytest_cache .ruff_cache build
	find defectlab data_scripts tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
