"""Sheets that show the inputs of a step: prompts with their candidate images, and images with their
candidate texts.

Axes: n inputs shown, G candidates, H W pixels. Images are uint8.
"""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER = (28, 32, 38), (98, 107, 119), (255, 255, 255)
CHOSEN, REJECTED = (19, 122, 80), (197, 59, 51)
GAP, FRAME = 10, 3


def candidates(prompts, pictures, rewards, chosen, rejected, tile=96):
  """Prompts x candidates, with the chosen and the rejected framed, and rewards below.

  Args:
    prompts: n strings.
    pictures: (n, G, H, W, 3) uint8.
    rewards: (n, G), nats per token.
    chosen, rejected: (n,) candidate indices; -1 marks none (a tie).
    tile: side of an image on the sheet, at least.

  Returns:
    A PIL image.
  """
  n, group = pictures.shape[:2]
  tile = _tile(pictures.shape[2], tile)
  label, row = 210, tile + 26 + GAP
  sheet = Image.new('RGB', (label + group * (tile + GAP) + GAP, n * row + GAP), PAPER)
  draw = ImageDraw.Draw(sheet)
  for i in range(n):
    top = GAP + i * row
    _paragraph(draw, (GAP, top), prompts[i], label - 2 * GAP, tile + 20)
    for j in range(group):
      left = label + j * (tile + GAP)
      color, mark = _verdict(j, chosen[i], rejected[i])
      if mark:
        draw.rectangle(
          (left - FRAME, top - FRAME, left + tile + FRAME - 1, top + tile + FRAME - 1), fill=color
        )
      sheet.paste(_scaled(pictures[i, j], tile), (left, top))
      words = f'{rewards[i, j]:.2f} {mark}'.rstrip()
      draw.text((left + tile / 2, top + tile + 6), words, fill=color, font=_font(13), anchor='ma')
  return sheet


def captions(pictures, texts, rewards, chosen, rejected, tile=96):
  """Images with their candidate texts and rewards, best first, with the chosen and the rejected
  marked.

  Args:
    pictures: (n, H, W, 3) uint8.
    texts: n lists of G strings.
    rewards: (n, G), nats per token.
    chosen, rejected: (n,) candidate indices; -1 marks none (a tie).
    tile: side of an image on the sheet, at least.

  Returns:
    A PIL image.
  """
  blocks = []
  for i, group in enumerate(texts):
    order = np.argsort(-np.asarray(rewards[i]), kind='stable')
    verdicts = [_verdict(j, chosen[i], rejected[i]) for j in order]
    blocks.append(
      [(color, mark, f'{rewards[i][j]:.2f}', group[j]) for j, (color, mark) in zip(order, verdicts)]
    )
  return _texts(pictures, blocks, tile)


def side_by_side(prompts, names, pictures, right, tile=96):
  """Prompts x samples of several models, a block of columns per model, one column per seed; correct
  images are framed.

  Args:
    prompts: n strings.
    names: of the models.
    pictures: one (n, S, H, W, 3) uint8 array per model.
    right: one (n, S) bool array per model.
    tile: side of an image on the sheet, at least.

  Returns:
    A PIL image.
  """
  samples = pictures[0].shape[1]
  tile = _tile(pictures[0].shape[2], tile)
  label, head = 210, 26
  block = samples * (tile + GAP) + 2 * GAP
  sheet = Image.new(
    'RGB', (label + len(names) * block, head + len(prompts) * (tile + GAP) + GAP), PAPER
  )
  draw = ImageDraw.Draw(sheet)
  for k, name in enumerate(names):
    draw.text((label + k * block, GAP // 2), name, fill=INK, font=_font(13))
    for i, prompt in enumerate(prompts):
      top = head + i * (tile + GAP)
      if not k:
        _paragraph(draw, (GAP, top), prompt, label - 2 * GAP, tile)
      for j in range(samples):
        left = label + k * block + j * (tile + GAP)
        if right[k][i, j]:
          draw.rectangle(
            (left - FRAME, top - FRAME, left + tile + FRAME - 1, top + tile + FRAME - 1),
            fill=CHOSEN,
          )
        sheet.paste(_scaled(pictures[k][i, j], tile), (left, top))
  return sheet


def statements(pictures, lines, tile=96):
  """Images with texts about them: images (n, H, W, 3) uint8; lines: n lists of (mark, text,
  whether it is right).
  """
  rows = [
    [((CHOSEN if right else REJECTED), mark, '', text) for mark, text, right in group]
    for group in lines
  ]
  return _texts(pictures, rows, tile)


def stack(sheets):
  """Sheets stacked vertically, with a thin line between them."""
  width = max(s.width for s in sheets)
  height = sum(s.height for s in sheets) + GAP * (len(sheets) - 1)
  out = Image.new('RGB', (width, height), PAPER)
  draw, top = ImageDraw.Draw(out), 0
  for i, sheet in enumerate(sheets):
    if i:
      draw.line((GAP, top - GAP // 2, width - GAP, top - GAP // 2), fill=(214, 218, 224))
    out.paste(sheet, (0, top))
    top += sheet.height + GAP
  return out


def _texts(pictures, blocks, tile):
  """One block per image, with its rows (color, mark, number, text) beside it."""
  tile, width, line = _tile(pictures.shape[1], tile), 1080, 18

  def wrap(text):
    return textwrap.wrap(text or '(empty)', (width - tile - 164) // 7) or ['(empty)']

  blocks = [[(*row[:3], wrap(row[3])) for row in rows] for rows in blocks]
  heights = [max(tile, line * sum(len(row[3]) for row in rows)) + 2 * GAP for rows in blocks]
  sheet = Image.new('RGB', (width, sum(heights) + GAP), PAPER)
  draw, top = ImageDraw.Draw(sheet), GAP
  for rows, height, picture in zip(blocks, heights, pictures):
    sheet.paste(_scaled(picture, tile), (GAP, top))
    y = top
    for color, mark, number, wrapped in rows:
      draw.text((tile + 26, y), mark, fill=color, font=_font(13))
      draw.text((tile + 122, y), number, fill=color, font=_font(13), anchor='ra')
      for part in wrapped:
        draw.text((tile + 136, y), part, fill=INK if color == FAINT else color, font=_font(13))
        y += line
    top += height
  return sheet


def _verdict(index, chosen, rejected):
  """The color and the name of a candidate's verdict."""
  if index == chosen:
    return CHOSEN, 'chosen'
  return (REJECTED, 'rejected') if index == rejected else (FAINT, '')


def _tile(side, least):
  return side * -(-least // side) if side < least else min(side, 192)


def _scaled(pixels, tile):
  image = Image.fromarray(np.asarray(pixels, np.uint8))
  # small images keep their pixels as squares
  return image.resize((tile, tile), Image.NEAREST if image.width <= tile else Image.LANCZOS)


def _font(size):
  return ImageFont.load_default(size)


def _paragraph(draw, corner, text, width, height):
  lines = textwrap.wrap(text, width // 7)
  room = height // 17
  if len(lines) > room:
    lines = lines[: room - 1] + [lines[room - 1][: width // 7 - 2] + ' …']
  draw.multiline_text(corner, '\n'.join(lines), fill=INK, font=_font(13), spacing=4)
