"""The page: Gradio's fields and buttons around `views.Views`.

The page contacts no other server: analytics are off, fonts are the reader's own, and a
Content-Security-Policy restricts the browser to this server.
"""

import importlib.resources
import os

os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # must be set before the import

import gradio as gr
from starlette.middleware import Middleware

from dsr_jax.demo import views as views_lib

TITLE = 'dsr_jax'
WAITING = 64  # clicks that wait; more are refused with a message
KEPT_SECONDS = 600  # of uploaded files
# Gradio's page has inline scripts and builds functions from its own strings.
POLICY = (
  "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
  "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'"
)
# For every click: the models answer one request at a time, and the page shows the queue.
ONE_AT_A_TIME = dict(concurrency_id='models', concurrency_limit=1, api_name=False)
SYSTEM_FONT = ('system-ui', '-apple-system', 'Segoe UI', 'sans-serif')


class _Policy:
  """Adds the Content-Security-Policy to every response."""

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    async def with_header(message):
      if message['type'] == 'http.response.start':
        message['headers'] = [*message['headers'], (b'content-security-policy', POLICY.encode())]
      await send(message)

    await self._app(scope, receive, with_header)


def build(views: views_lib.Views) -> gr.Blocks:
  """The page for these models."""
  with gr.Blocks(
    title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
  ) as page:
    also = f', compared with **{_plain(views.compared)}**' if views.compared else ''
    gr.Markdown(f'# {TITLE}\n**{_plain(views.name)}** judges its own work{also}.')
    with gr.Tab('Draw'):
      _draw_tab(views)
    with gr.Tab('Describe'):
      _describe_tab(views)
    if views.steps():
      with gr.Tab('Run'):
        _run_tab(views, page)
  return page.queue(max_size=WAITING)


def _draw_tab(views):
  with gr.Row():
    prompt = gr.Textbox(
      label='Prompt',
      value='a red disc left of a blue square',
      max_length=views_lib.MAX_PROMPT,
      scale=4,
    )
    seed = gr.Number(label='Seed', value=42, precision=0, minimum=0, scale=1, min_width=100)
  with gr.Row():
    temperature = gr.Dropdown(list(views_lib.TEMPERATURES), label='Temperature', min_width=140)
    guidance = gr.Dropdown(list(views_lib.GUIDANCES), label='Guidance', min_width=140)
    button = gr.Button('Draw', variant='primary', min_width=140)
  shown = gr.HTML(apply_default_css=False)
  asked = [prompt, seed, temperature, guidance]
  for event in (button.click, prompt.submit):
    event(views.draw, asked, shown, **ONE_AT_A_TIME)


def _describe_tab(views):
  with gr.Row():
    file = gr.Image(label='Picture', sources=['upload', 'clipboard'], height=220, min_width=220)
    # Pass the file on unread, so that our own message reports a broken one. Replaced here and not
    # in a subclass, because Gradio would write a .pyi file beside this one.
    file.preprocess = _path_of
    with gr.Column(min_width=260):
      question = gr.Textbox(
        label='Question', placeholder=views.question, max_length=views_lib.MAX_PROMPT
      )
      with gr.Row():
        seed = gr.Number(label='Seed', value=42, precision=0, minimum=0, min_width=100)
        temperature = gr.Dropdown(list(views_lib.TEMPERATURES), label='Temperature', min_width=140)
      button = gr.Button('Describe', variant='primary')
  shown = gr.HTML(apply_default_css=False)
  asked = [file, question, seed, temperature]
  for event in (button.click, question.submit):
    event(views.describe, asked, shown, **ONE_AT_A_TIME)


def _path_of(payload) -> str | None:
  """The path of the uploaded file in Gradio's record of an image."""
  return payload.path if payload else None


def _run_tab(views, page):
  step = gr.Dropdown([], label='Step')
  shown = gr.HTML(apply_default_css=False)

  def newest():  # each time the page is opened: the run may still be training
    steps = views.steps()
    return gr.Dropdown(steps, value=steps[-1])

  page.load(newest, None, step, **ONE_AT_A_TIME)
  step.change(views.step, step, shown, **ONE_AT_A_TIME)


def launch(page: gr.Blocks, host: str, port: int, block: bool = True):
  """Serves the page until Ctrl-C."""
  css = importlib.resources.files('dsr_jax.demo') / 'templates' / 'demo.css'
  page.launch(
    server_name=host,
    server_port=port,
    share=False,
    quiet=True,
    prevent_thread_lock=not block,
    max_file_size=views_lib.MAX_FILE,
    footer_links=[],
    ssr_mode=False,
    run_history=False,
    enable_monitoring=False,
    css=css.read_text(encoding='utf-8'),
    theme=gr.themes.Default(
      primary_hue='blue', font=SYSTEM_FONT, font_mono=('ui-monospace', 'monospace')
    ),
    app_kwargs={'middleware': [Middleware(_Policy)], 'docs_url': None, 'redoc_url': None},
  )


def _plain(text: str) -> str:
  """A name, escaped for Markdown."""
  return ''.join(f'\\{c}' if c in '\\`*_{}[]()<>#+-.!|~' else c for c in text)
