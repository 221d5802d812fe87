"""Our pages in a real browser: at desk and phone width, light and dark.

Wants a Chromium on the PATH (`apt-get install chromium`) and axe-core (`pip install
axe-core-python`); without one of them these tests are skipped, and `test_accessible` stays.
"""

import html
import importlib.util
import json
import os
import pathlib
import re
import subprocess

from browsers import BROWSER
import pytest
from run_pages import PAGES

pytestmark = pytest.mark.slow

WIDTHS = (1400, 390)
# In the page: what is wider than it, and axe's findings of weight, as JSON in an element.
PROBE = """
<script>
  const wide = [...document.querySelectorAll('body *')].filter(e => {
    if (e.closest('.scroll, .sheet, pre, svg')) return false;
    const box = e.getBoundingClientRect();
    return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
  }).map(e => e.tagName + '.' + e.className);
  const page = document.documentElement;
  axe.run(document, {resultTypes: ['violations']}).then(found => {
    const out = document.createElement('script');
    out.type = 'application/json';
    out.id = 'found';
    out.textContent = JSON.stringify({
      width: innerWidth,
      overflow: page.scrollWidth - page.clientWidth,
      wide: wide.slice(0, 5),
      violations: found.violations
        .filter(v => ['serious', 'critical'].includes(v.impact))
        .map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 200)]),
    });
    document.body.append(out);
  });
</script>
"""


def axe():
  found = importlib.util.find_spec('axe_core_python')
  path = found and pathlib.Path(found.submodule_search_locations[0]) / 'axe.min.js'
  return path.read_text() if path and path.exists() else None


def looked_at(text, folder, width, dark):
  """What the browser says of a page: {'width', 'overflow', 'wide', 'violations'}."""
  page = folder / 'page.html'
  probe = f'<script>{axe()}</script>{PROBE}</body>'
  page.write_text(text.replace('</body>', probe))
  frame = folder / 'frame.html'
  # A window has a least width; a frame has not.
  frame.write_text(
    '<body style="margin:0"><script>addEventListener("message", e => {'
    'const p = document.createElement("pre"); p.id = "said"; p.textContent = e.data;'
    'document.body.append(p);});</script>'
    f'<iframe style="border:0;width:{width}px;height:3000px" srcdoc="'
    + html.escape(
      page.read_text().replace(
        'document.body.append(out);', 'parent.postMessage(out.textContent, "*");'
      )
    )
    + '"></iframe></body>'
  )
  done = subprocess.run(
    [
      BROWSER,
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      f'--user-data-dir={folder / "profile"}',
      f'--blink-settings=preferredColorScheme={0 if dark else 1}',
      '--virtual-time-budget=60000',
      '--timeout=120000',
      '--dump-dom',
      '--window-size=1600,3000',
      frame.as_uri(),
    ],
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, 'HOME': str(folder)},
  )
  said = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
  assert said, done.stderr[-2000:]
  return json.loads(html.unescape(said[1]))


@pytest.mark.skipif(BROWSER is None or axe() is None, reason='wants Chromium and axe-core-python')
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('name', PAGES)
def test_a_page_fits_and_axe_finds_nothing_serious(name, width, dark, tmp_path):
  text = PAGES[name](tmp_path / 'made')
  found = looked_at(text, tmp_path, width, dark)
  assert found['width'] == width
  assert found['overflow'] <= 0 and found['wide'] == []
  assert found['violations'] == []
