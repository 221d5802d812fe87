"""The browser of this machine, for tests of pages."""

import shutil

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
