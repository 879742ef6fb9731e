// The original image from a shard that the user opens: a local page may not read other files.

const shards = new Map();

// Return the address of a member in tar records, or undefined.
async function memberOf(file, { offset, size, member }) {
  const records = new Uint8Array(await file.slice(offset, offset + size).arrayBuffer());
  const text = (from, length) => {
    const bytes = records.subarray(from, from + length), end = bytes.indexOf(0);
    return new TextDecoder().decode(end < 0 ? bytes : bytes.subarray(0, end));
  };
  let long;  // name of more than 100 bytes, from the PAX header
  for (let at = 0; at + 512 <= records.length;) {
    const length = parseInt(text(at + 124, 12), 8), name = long ?? text(at, 100);
    if (!(length >= 0)) return undefined;
    long = text(at + 156, 1) === "x" ? /\d+ path=(.*)\n/.exec(text(at + 512, length))?.[1] : undefined;
    if (name === member) {
      const kind = { png: "image/png", jpg: "image/jpeg", webp: "image/webp" }[member.split(".").pop()];
      return URL.createObjectURL(new Blob([records.subarray(at + 512, at + 512 + length)], { type: kind }));
    }
    at += 512 + Math.ceil(length / 512) * 512;
  }
  return undefined;
}
