"""Scripts that call `launch.run`, and what it takes to run them as a user would."""

import os
from pathlib import Path

SCRIPTS = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    """The environment for a script that lies elsewhere than the library that it imports."""
    paths = [str(SCRIPTS.parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
