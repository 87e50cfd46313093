// Weights and inputs of golden cases by name: eridiff/trace/hashfill.py says what becomes of these numbers.
//
// node hashfill.js flux-dev-tiny img_in.weight 4

const wrap = (z) => BigInt.asUintN(64, z);

// FNV-1a of salt/name
function seed(salt, name) {
  let h = 0xcbf29ce484222325n;
  for (const byte of new TextEncoder().encode(`${salt}/${name}`)) h = wrap((h ^ BigInt(byte)) * 0x100000001b3n);
  return h;
}

// splitmix64, 24 bits, [-1, 1)
function uniform(seed, index) {
  let z = wrap(seed + BigInt(index + 1) * 0x9e3779b97f4a7c15n);
  z = wrap((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n);
  z = wrap((z ^ (z >> 27n)) * 0x94d049bb133111ebn);
  z ^= z >> 31n;
  return Number(z >> 40n) / 8388608 - 1;
}

const [salt, name, count] = process.argv.slice(2);
const start = seed(salt, name);
for (let i = 0; i < Number(count); i++) console.log(uniform(start, i));
