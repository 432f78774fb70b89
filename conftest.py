"""What every run of pytest here needs, that of notebooks included."""

pytest_plugins = ["tools.busy_cells"]
