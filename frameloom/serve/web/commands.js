// A video's settings as a command of the shell.

const OPTIONS = {
  width: "--width", height: "--height", num_frames: "--frames", steps: "--steps", guidance_scale: "--guidance",
  guidance_scale_2: "--guidance-2", flow_shift: "--flow-shift", fps: "--fps", seed: "--seed",
  negative_prompt: "--negative-prompt", quality: "--quality",
};

/** A word as a POSIX shell reads it back. */
export function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${String(text).replaceAll("'", "'\\''")}'`;
}

const given = (video, name) => video[name] !== null && video[name] !== undefined && video[name] !== "";

/** `frameloom generate` with these settings. Pictures and LoRAs are files there: their places are left to fill in. */
export function asCommand(video, builtIn) {
  const words = ["frameloom", "generate", quoted(video.prompt ?? "")];
  if (!builtIn) words.push("--model", quoted(video.model));
  for (const [name, option] of Object.entries(OPTIONS)) {
    if (given(video, name)) words.push(option, quoted(String(video[name])));
  }
  for (const { name, scale, strength } of video.loras ?? []) {
    words.push("--lora", quoted(`${name}.safetensors:${scale ?? strength ?? 1}`));
  }
  for (const [name, option] of [["input_reference", "--image"], ["last_image", "--last-image"]]) {
    if (video.inputs?.includes(name)) words.push(option, `${name}.png`);
  }
  return [...words, "--output", `${video.id}.mp4`].join(" ");
}

/** The request to this server, for curl; the key is read from FRAMELOOM_KEY where one is used. */
export function asCurl(video, withKey) {
  const fields = Object.fromEntries(
    ["model", "prompt", ...Object.keys(OPTIONS), "loras"].filter((name) => given(video, name) && video[name].length !== 0)
      .map((name) => [name, video[name]]),
  );
  const words = ["curl", quoted(new URL("v1/videos", document.baseURI).href)];
  if (withKey) words.push("-H", '"Authorization: Bearer $FRAMELOOM_KEY"');
  if (!video.inputs?.length) {
    return [...words, "-H", "'Content-Type: application/json'", "-d", quoted(JSON.stringify(fields))].join(" ");
  }
  for (const [name, value] of Object.entries(fields)) {
    words.push("-F", quoted(`${name}=${typeof value === "object" ? JSON.stringify(value) : value}`));
  }
  for (const name of video.inputs) words.push("-F", quoted(`${name}=@${name}.png`));
  return words.join(" ");
}
