// A video's settings as a command of the shell.

const OPTIONS = {
  width: "--width", height: "--height", num_frames: "--frames", steps: "--steps", guidance_scale: "--guidance",
  guidance_scale_2: "--guidance-2", flow_shift: "--flow-shift", fps: "--fps", seed: "--seed",
  negative_prompt: "--negative-prompt", quality: "--quality", strength: "--strength",
  control_strength: "--control-strength", window_frames: "--window-frames", window_overlap: "--window-overlap",
};
const FILES = {
  input_reference: ["--image", "input_reference.png"], last_image: ["--last-image", "last_image.png"],
  references: ["--reference", "reference.png"], video: ["--video", "video.mp4"], mask: ["--mask", "mask.mp4"],
  control_video: ["--control-video", "control_video.mp4"],
};

/** A word as a POSIX shell reads it back. */
export function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${String(text).replaceAll("'", "'\\''")}'`;
}

/** What a video says of a name: nothing, one value or several. */
const given = (video, name) => [video[name] ?? []].flat();

/**
 * `frameloom generate` with these settings. Pictures and LoRAs are files there: their places are left to fill in.
 * null of a video that goes on from another one, which no command makes.
 */
export function asCommand(video, builtIn) {
  if (video.extends) return null;
  const words = ["frameloom", "generate"];
  if (!builtIn) words.push("--model", quoted(video.model));
  for (const [name, option] of Object.entries(OPTIONS)) {
    for (const value of given(video, name)) words.push(option, quoted(String(value)));
  }
  for (const value of given(video, "windows")) words.push(value ? "--windows" : "--no-windows");
  for (const { name, scale, strength } of given(video, "loras")) {
    words.push("--lora", quoted(`${name}.safetensors:${scale ?? strength ?? 1}`));
  }
  for (const name of given(video, "inputs")) words.push(...FILES[name]);
  words.push("--output", `${video.id}.mp4`);
  const prompt = video.prompt ?? "";
  return [...words, ...(prompt.startsWith("-") ? ["--"] : []), quoted(prompt)].join(" ");
}

/**
 * The request to this server, for curl; the key is read from FRAMELOOM_KEY where one is used. Of a video that starts
 * from pictures: to make it once more, as its pictures are on the server.
 */
export function asCurl(video, withKey) {
  const again = given(video, "inputs").length > 0;
  const names = again ? ["prompt"] : ["model", "prompt", ...Object.keys(OPTIONS), "windows", "loras"];
  const fields = names.filter((name) => given(video, name).length).map((name) => [name, video[name]]);
  const words = ["curl", quoted(new URL(again ? `v1/videos/${video.id}/remix` : "v1/videos", document.baseURI).href)];
  if (withKey) words.push("-H", '"Authorization: Bearer $FRAMELOOM_KEY"');
  words.push("-H", "'Content-Type: application/json'", "-d", quoted(JSON.stringify(Object.fromEntries(fields))));
  return words.join(" ");
}
