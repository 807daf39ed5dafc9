//! What the list of a layer's files costs: `ledger LAYER.tar ROUNDS DIRECTORY` unpacks the layer, makes the list, and says how long
//! each took (medians) and how large the list is. The directory is on the medium that is to be measured.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use foreshore_images::ledger::list;
use foreshore_images::unpack::{Budget, unpack_layer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [layer, rounds, directory] = arguments.as_slice() else {
        return Err("usage: ledger LAYER.tar ROUNDS DIRECTORY".into());
    };
    let budget = Budget {
        bytes: u64::MAX,
        entries: u64::MAX,
    };
    let (mut unpacked, mut listed) = (Vec::new(), Vec::new());
    let mut found = None;
    for _ in 0..rounds.parse::<u32>()?.max(1) {
        let place = PathBuf::from(directory).join("ledger-bench");
        let tree = place.join("tree");
        fs::create_dir_all(&tree)?;
        let begin = Instant::now();
        unpack_layer(&mut File::open(layer)?, &tree, &[], budget)?;
        let middle = Instant::now();
        found = Some(list(&tree, &place.join("ledger"))?);
        let end = Instant::now();
        unpacked.push(middle - begin);
        listed.push(end - middle);
        fs::remove_dir_all(&place)?;
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64()
    };
    let (unpacked, listed) = (median(&mut unpacked), median(&mut listed));
    let found = found.ok_or("there was no round")?;
    println!(
        "{} names, {} MiB: unpacked in {unpacked:.3} s, listed in {listed:.3} s ({:.1} % more), {} bytes of list for 1000 names",
        found.names,
        found.bytes >> 20,
        listed / unpacked * 100.0,
        found.ledger_bytes * 1000 / found.names.max(1),
    );
    Ok(())
}
