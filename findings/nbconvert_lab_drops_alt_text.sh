#!/usr/bin/env bash
# A picture of a notebook may have alt text: metadata "alt" of its image/png. nbconvert's template "classic" writes it
# into the page. The default template, "lab", writes "No description has been provided for this image" for the same
# notebook. The alt text was expected in both.
# The way round: --template classic, or a template of one's own that overrides the block data_png.
. "$(dirname "$0")/environment.sh" "nbconvert==7.17.2" "nbformat==5.11.1"

observe <<'EOF'
import logging

import nbconvert
import nbformat

logging.disable(logging.WARNING)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+M8AAAMBAQAY3Y2wAAAAAElFTkSuQmCC"
output = nbformat.v4.new_output(
    "display_data", data={"image/png": PIXEL}, metadata={"image/png": {"alt": "latency falls"}}
)
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])
print("nbconvert", nbconvert.__version__)
for template in ("classic", "lab"):
    page, _ = nbconvert.HTMLExporter(template_name=template).from_notebook_node(notebook)
    print(f"{template}:", page.split('alt="')[1].split('"')[0])
EOF
expect <<'EOF'
nbconvert 7.17.2
classic: latency falls
lab: No description has been provided for this image
EOF
