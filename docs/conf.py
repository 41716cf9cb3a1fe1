"""Sphinx configuration: sphinx-build -W -b html docs docs/_build/html

The build runs the tutorials: in full, or a few steps of each with SMOKE_TEST=1 in the environment.
"""

import os
import sys
from pathlib import Path

import pyro_vae  # (a tree that cannot be imported must stop the build, not empty its pages)

project = "pyro_vae"
author = "the pyro_vae authors"
copyright = "2026, the pyro_vae authors"
release = version = pyro_vae.__version__

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this file

import listing  # noqa: E402

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # the site brings MathJax along, so that formulas show without a network
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gen_modules"]
default_role = "literal"  # single backticks in docstrings are code
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
copybutton_exclude = ".linenos, .gp, .go"
myst_heading_anchors = 3

autoclass_content = "class"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pyro_vae.css"]
html_title = "pyro_vae" + (" (smoke run: no number means anything)" if "SMOKE_TEST" in os.environ else "")

# A tutorial that raises fails the build, after all have run. What a page shows is what the program prints and draws.
sphinx_gallery_conf = {
    "examples_dirs": "../tutorials",  # its head is GALLERY_HEADER.txt: README.md there would come before a .rst
    "gallery_dirs": "tutorials",
    "filename_pattern": r"/(quickstart|\d\d_\w+)\.py$",  # these run
    "ignore_pattern": r"^record\.py$",
    "within_subsection_order": "gallery.quickstart_first",
    "reset_modules": ("matplotlib", "gallery.fresh_start"),
    "run_stale_examples": True,  # their text may be old, the library is not
    "capture_repr": (),
    "remove_config_comments": True,
    "image_srcset": ["2x"],
    # Names in the code of a tutorial are links to the API, and the API shows the tutorials that use them.
    "doc_module": ("pyro_vae",),
    "reference_url": {"pyro_vae": None},
    "backreferences_dir": "gen_modules/backreferences",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
}


def setup(app):
    import links  # needs Sphinx, and tests read this file without it

    app.connect("source-read", listing.fill_in)
    app.connect("env-get-outdated", listing.pages_to_read)
    app.add_post_transform(links.LinkNames)
    app.connect("missing-reference", links.outside)
