//! Unpacks one layer for another process, unconfined: what the tests put in the place of `foreshore-agent unpack`.

use foreshore_images::unpack::job::{read_job, serve};

fn main() -> std::io::Result<()> {
    let mut stdin = std::io::stdin().lock();
    let job = read_job(&mut stdin)?;
    serve(&job, stdin, &mut std::io::stdout().lock())
}
