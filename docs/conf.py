from importlib.metadata import version as installed_version

project = "hessopt"
author = "the hessopt developers"
copyright = f"2026, {author}"
version = release = installed_version("hessopt")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # autodoc documents the members; a second description of each would clash

html_theme = "furo"
html_title = "hessopt"
