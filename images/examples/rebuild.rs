//! Makes the tar stream of a layer of a delta and the old layers' directories, as a device does:
//! `rebuild DELTA [TREE…] > LAYER.tar`. Says on standard error what it is (its diff id) and the most memory it took.

use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;

use foreshore_images::Digest;
use foreshore_images::delta::Rebuilt;
use sha2::{Digest as _, Sha256};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let delta = arguments.next().ok_or("usage: rebuild DELTA [TREE…]")?;
    let trees: Vec<PathBuf> = arguments.collect();
    let mut rebuilt = Rebuilt::new(io::BufReader::new(std::fs::File::open(delta)?), &trees)?;
    let mut stdout = io::stdout().lock();
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = rebuilt.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        stdout.write_all(&buffer[..count])?;
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let diff_id = Digest::from_bytes(hasher.finalize().into());
    eprintln!("{diff_id} {}", peak.unwrap_or("unknown").trim());
    Ok(())
}
