"""Builds the site: `make docs`. All that it needs is at hand, nothing is fetched."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "_extensions")]

import inventories  # noqa: E402

import sirfshampoo  # noqa: E402

project = "SIRFShampoo"
author = "The SIRFShampoo authors"
version = release = sirfshampoo.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "offline",
    "pages",
    "pictures",
    "public_names",
    "signatures",
]
exclude_patterns = ["_build", "_extensions", "gallery/*.py.md5"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(T|Self|ParamsT|optional|Parameter)")]

html_theme = "furo"
html_title = f"SIRFShampoo {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_math_renderer = "mathml"

autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as they are written, not what they are at runtime
maximum_signature_line_length = 80
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]

copybutton_prompt_text = ">>> "

intersphinx_mapping = inventories.written(DOCS / "_build" / "inventories")

sphinx_gallery_conf = {
    "examples_dirs": [str(ROOT / "examples" / "gallery")],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "capture_repr": (),
    "write_computation_times": False,
    "show_signature": False,
    "abort_on_example_error": True,
    "min_reported_time": 30,
    "reset_modules": ("matplotlib",),
    "remove_config_comments": True,
}
