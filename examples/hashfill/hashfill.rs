//! Weights and inputs of golden cases by name: eridiff/trace/hashfill.py says what becomes of these numbers.
//!
//! rustc -O hashfill.rs && ./hashfill flux-dev-tiny img_in.weight 4

/// FNV-1a of salt/name.
fn seed(salt: &str, name: &str) -> u64 {
    format!("{salt}/{name}").bytes().fold(0xCBF29CE484222325, |h, byte| (h ^ byte as u64).wrapping_mul(0x100000001B3))
}

/// splitmix64, 24 bits, [-1, 1).
fn uniform(seed: u64, index: u64) -> f64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
    z ^= z >> 31;
    (z >> 40) as f64 / 8388608.0 - 1.0
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let seed = seed(&words[1], &words[2]);
    for index in 0..words[3].parse().expect("how many numbers") {
        println!("{}", uniform(seed, index));
    }
}
