//! Ed25519 by itself, in short batches as the bench asks for them, so that what else the machine
//! does falls on both sides alike.
//!
//! Each line `sign COUNT LENGTH` or `verify COUNT LENGTH` on the standard input is answered by the
//! nanoseconds that so many operations on a message of that length took together. The key to verify
//! with is ready before, as is the signing key.

use ed25519_dalek::{Signer, SigningKey};
use std::hint::black_box;
use std::io::{self, BufRead, Write};
use std::time::Instant;

fn main() -> io::Result<()> {
    let key = SigningKey::from_bytes(&[7; 32]);
    let public = key.verifying_key();
    let mut out = io::stdout();
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[what, count, length] = words.as_slice() else {
            return Err(io::Error::other(format!("not understood: {line}")));
        };
        let number = |text: &str| text.parse::<usize>().map_err(io::Error::other);
        let (count, message) = (number(count)?, vec![42; number(length)?]);
        let signature = key.sign(&message);
        let start = Instant::now();
        match what {
            "sign" => {
                for _ in 0..count {
                    black_box(key.sign(black_box(&message)));
                }
            }
            "verify" => {
                for _ in 0..count {
                    let valid = public.verify_strict(black_box(&message), &signature);
                    valid.map_err(io::Error::other)?;
                }
            }
            _ => return Err(io::Error::other(format!("not understood: {line}"))),
        }
        writeln!(out, "{}", start.elapsed().as_nanos())?;
        out.flush()?;
    }
    Ok(())
}
