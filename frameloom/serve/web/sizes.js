// Sizes and lengths that a model can make: its multiples, and the shapes that people ask for.

export const SHAPES = [
  { name: "16:9", title: "Wide", ratio: 16 / 9 },
  { name: "4:3", title: "Classic", ratio: 4 / 3 },
  { name: "1:1", title: "Square", ratio: 1 },
  { name: "3:4", title: "Portrait", ratio: 3 / 4 },
  { name: "9:16", title: "Tall", ratio: 9 / 16 },
];

/** The nearest multiple, one at least. */
export const snap = (value, multiple) => Math.max(multiple, Math.round(value / multiple) * multiple);

/** The nearest number of frames that the model makes: 1 + temporal x k. */
export const snapFrames = (frames, temporal) => 1 + temporal * Math.max(0, Math.round((frames - 1) / temporal));

/** The name of the shape that is nearest to a size. */
export function shapeOf(width, height) {
  const distance = (shape) => Math.abs(Math.log(shape.ratio / (width / height)));
  return SHAPES.reduce((best, shape) => (distance(shape) < distance(best) ? shape : best)).name;
}

/** The sizes offered, as { name, label, area }: the usual resolutions, or multiples of what a small model makes. */
export function tiers(defaults) {
  const own = defaults.width * defaults.height;
  const short = Math.min(defaults.width, defaults.height);
  const offered =
    short >= 400
      ? [["480p", 832 * 480], ["720p", 1280 * 720], ["1080p", 1920 * 1080]]
      : [1, 1.5, 2].map((factor) => [`${Math.round(short * factor)} px`, own * factor * factor]);
  const usual = offered.reduce((best, tier) =>
    Math.abs(Math.log(tier[1] / own)) < Math.abs(Math.log(best[1] / own)) ? tier : best,
  );
  return offered.map(([name, area]) => ({ name, area, usual: name === usual[0] }));
}

/** Width and height of a shape and a size, as the model can make them. The model's own size is met exactly. */
export function sizeOf(ratio, tier, card) {
  const { width, height } = card.defaults;
  const own = SHAPES.find((shape) => shape.name === shapeOf(width, height)).ratio;
  if (tier.usual && ratio === own) return { width, height };
  const high = Math.sqrt(tier.area / ratio);
  return { width: snap(high * ratio, card.width_multiple), height: snap(high, card.height_multiple) };
}

/** Lengths worth a button: half of the usual one, the usual one, and twice it; in frames. */
export function lengths(defaults, temporal) {
  const usual = defaults.num_frames;
  return [...new Set([usual / 2, usual, usual * 2].map((frames) => snapFrames(frames, temporal)))];
}
