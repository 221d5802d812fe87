"""Where things lie in a clone."""

import pathlib

SUPPORT = pathlib.Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
CONFIGS = ROOT / 'configs'
