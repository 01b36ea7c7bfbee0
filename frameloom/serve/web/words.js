// Numbers and states in words.

/** Seconds as people say them: "4 s", "2 min", "1 h 20 min". */
export function duration(seconds) {
  if (seconds < 1) return "under 1 s";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  const hours = Math.floor(seconds / 3600);
  const minutes = Math.round((seconds - hours * 3600) / 60);
  return minutes ? `${hours} h ${minutes} min` : `${hours} h`;
}

/** Seconds of a video: "2 s", "2.5 s", "0.06 s". */
const playing = (seconds) => `${Number(seconds < 0.1 ? seconds.toPrecision(1) : seconds.toFixed(1))} s`;

/** The length of a video as the API has it, from the first frame to the last: 17 frames, 8 each second, are "2 s". */
export const length = (frames, fps) => playing(Math.max(frames - 1, 1) / fps);

/** Bytes in the unit people buy memory in. */
export function bytes(count) {
  if (count < 1e6) return `${Math.max(1, Math.round(count / 1e3))} kB`;
  if (count < 1e9) return `${Math.round(count / 1e6)} MB`;
  return `${(count / 1e9).toFixed(1)} GB`;
}

/** How long ago a time in seconds since 1970 was. */
export function ago(time, now = Date.now() / 1000) {
  const passed = Math.max(0, now - time);
  if (passed < 60) return "just now";
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 86400) return `${Math.floor(passed / 3600)} h ago`;
  return new Date(time * 1000).toLocaleDateString(undefined, { dateStyle: "medium" });
}

const STAGES = {
  text: "Reading the prompt",
  image: "Reading the picture",
  denoise: "Drawing",
  decode: "Developing the frames",
  encode: "Writing the file",
};

/** What is being done to a video, in one line. */
export function standing(video) {
  if (video.status === "queued") return waiting(video);
  if (video.status === "failed") return video.error?.code === "cancelled" ? "Cancelled" : "Failed";
  if (video.status === "completed") return "Done";
  const stage = STAGES[video.stage] ?? "Starting";
  const counted = video.stage && video.total > 1 ? `, ${video.step} of ${video.total}` : "";
  return stage + counted;
}

function waiting(video) {
  const before = video.queue_position;
  if (before === null || before === undefined) return "Waiting";
  if (before === 0) return "Next in line";
  return before === 1 ? "One video before it" : `${before} videos before it`;
}

/** The time that is left, where the server can say. */
export function remaining(video) {
  const seconds = video.remaining_seconds;
  return seconds === null || seconds === undefined ? "" : `about ${duration(Math.max(1, seconds))} left`;
}

/** Whether a job still waits or runs. */
export const isActive = (video) => video.status === "queued" || video.status === "in_progress";

/** Frames, rate and size of a job, whatever of them the server told. */
export function shape(video) {
  const [width, height] = (video.size ?? "").split("x").map(Number);
  return {
    width: video.width || width || 16,
    height: video.height || height || 9,
    frames: video.num_frames ?? null,
    fps: video.fps ?? null,
  };
}

/** The length of a job's video as the cards show it; nothing while the server cannot tell. */
export function lengthOf(video) {
  const seconds = Number(video.seconds);
  return seconds > 0 ? playing(seconds) : ""; // "auto" while nobody can tell
}
