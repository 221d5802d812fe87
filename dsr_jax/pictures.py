"""Sheets that show what a step saw: prompts with their candidate pictures, pictures with their candidate texts.

Axes: n inputs shown, G candidates, H W pixels. Pictures are uint8.
"""

import io
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER = (28, 32, 38), (126, 134, 144), (255, 255, 255)
CHOSEN, REJECTED = (22, 140, 84), (206, 58, 50)
GAP, FRAME = 10, 3


def candidates(prompts, pictures, rewards, chosen, rejected, tile=96):
  """Prompts x candidates, the chosen and the rejected framed, rewards below.

  Args:
    prompts: n strings.
    pictures: (n, G, H, W, 3) uint8.
    rewards: (n, G), nats a token.
    chosen, rejected: (n,) candidate indices; -1 marks none (a tie).
    tile: side of a picture on the sheet, at least.

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
        draw.rectangle((left - FRAME, top - FRAME, left + tile + FRAME - 1, top + tile + FRAME - 1), fill=color)
      sheet.paste(_scaled(pictures[i, j], tile), (left, top))
      words = f'{rewards[i, j]:.2f} {mark}'.rstrip()
      draw.text((left + tile / 2, top + tile + 6), words, fill=color, font=_font(13), anchor='ma')
  return sheet


def captions(pictures, texts, rewards, chosen, rejected, tile=96):
  """Pictures with their candidate texts and rewards, best first; the chosen and the rejected marked.

  Args:
    pictures: (n, H, W, 3) uint8.
    texts: n lists of G strings.
    rewards: (n, G), nats a token.
    chosen, rejected: (n,) candidate indices; -1 marks none (a tie).
    tile: side of a picture on the sheet, at least.

  Returns:
    A PIL image.
  """
  tile, width, line = _tile(pictures.shape[1], tile), 1080, 18
  blocks = []
  for i, group in enumerate(texts):
    rows = []
    for j in np.argsort(-np.asarray(rewards[i]), kind='stable'):
      color, mark = _verdict(j, chosen[i], rejected[i])
      wrapped = textwrap.wrap(group[j] or '(empty)', (width - tile - 164) // 7) or ['(empty)']
      rows.append((wrapped, color, mark, rewards[i][j]))
    blocks.append((rows, max(tile, line * sum(len(r[0]) for r in rows)) + 2 * GAP))
  sheet = Image.new('RGB', (width, sum(h for _, h in blocks) + GAP), PAPER)
  draw = ImageDraw.Draw(sheet)
  top = GAP
  for (rows, height), picture in zip(blocks, pictures):
    sheet.paste(_scaled(picture, tile), (GAP, top))
    y = top
    for wrapped, color, mark, reward in rows:
      draw.text((tile + 26, y), mark, fill=color, font=_font(13))
      draw.text((tile + 122, y), f'{reward:.2f}', fill=color, font=_font(13), anchor='ra')
      for part in wrapped:
        draw.text((tile + 136, y), part, fill=INK if color == FAINT else color, font=_font(13))
        y += line
    top += height
  return sheet


def stack(sheets):
  """Sheets under one another, a thin line between."""
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


def png(image):
  """PIL image -> PNG bytes."""
  buffer = io.BytesIO()
  image.save(buffer, 'PNG', optimize=True)
  return buffer.getvalue()


def _verdict(index, chosen, rejected):
  """The color and the name of what became of a candidate."""
  if index == chosen:
    return CHOSEN, 'chosen'
  return (REJECTED, 'rejected') if index == rejected else (FAINT, '')


def _tile(side, least):
  return side * -(-least // side) if side < least else min(side, 192)


def _scaled(pixels, tile):
  image = Image.fromarray(np.asarray(pixels, np.uint8))
  # small pictures keep their pixels as squares
  return image.resize((tile, tile), Image.NEAREST if image.width <= tile else Image.LANCZOS)


def _font(size):
  return ImageFont.load_default(size)


def _paragraph(draw, corner, text, width, height):
  lines = textwrap.wrap(text, width // 7)
  room = height // 17
  if len(lines) > room:
    lines = lines[:room - 1] + [lines[room - 1][:width // 7 - 2] + ' …']
  draw.multiline_text(corner, '\n'.join(lines), fill=INK, font=_font(13), spacing=4)
