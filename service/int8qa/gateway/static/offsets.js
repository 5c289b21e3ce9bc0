// Offsets of answers into texts, and texts into pieces.
// The gateway counts Unicode code points; JavaScript's strings count UTF-16 units.

/** Where code points of a text begin, in UTF-16 units; offsets behind its end give its length. */
export function findUnits(text, codePoints) {
  const units = new Map();
  let unit = 0;
  let point = 0;
  for (const target of [...new Set(codePoints)].sort((a, b) => a - b)) {
    while (point < target && unit < text.length) {
      unit += text.codePointAt(unit) > 0xffff ? 2 : 1;
      point += 1;
    }
    units.set(target, unit);
  }
  return units;
}

/** Number of code points of a text. */
export function countCodePoints(text) {
  let count = 0;
  for (let unit = 0; unit < text.length; unit += text.codePointAt(unit) > 0xffff ? 2 : 1) {
    count += 1;
  }
  return count;
}

/**
 * Cut a text where marks begin and end.
 * Marks are {start, end, kind} in code points and may overlap; a piece is
 * {text, kinds}, with no kinds outside of all marks.
 */
export function cutPieces(text, marks) {
  const units = findUnits(text, marks.flatMap((mark) => [mark.start, mark.end]));
  const spans = marks
    .map((mark) => ({ from: units.get(mark.start), to: units.get(mark.end), kind: mark.kind }))
    .filter((span) => span.from < span.to);
  const cuts = new Set([0, text.length]);
  for (const span of spans) {
    cuts.add(span.from).add(span.to);
  }
  const sorted = [...cuts].sort((a, b) => a - b);
  return sorted.slice(1).map((to, index) => {
    const from = sorted[index];
    const kinds = spans.filter((span) => span.from <= from && to <= span.to).map((span) => span.kind);
    return { text: text.slice(from, to), kinds: [...new Set(kinds)] };
  });
}
