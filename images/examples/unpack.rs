//! Unpacks one layer for another process, or with `inflate` for an argument inflates one; unconfined: what the tests put in the
//! place of `foreshore-agent unpack` and `foreshore-agent inflate`.

use std::io;
use std::process::ExitCode;

use foreshore_images::unpack::job::{inflate, read_job, rebuild, serve};

fn main() -> io::Result<ExitCode> {
    let mut stdin = io::stdin().lock();
    let mut stdout = io::stdout().lock();
    let mut arguments = std::env::args().skip(1);
    let (verb, root) = (arguments.next(), arguments.next().unwrap_or_default());
    if verb.as_deref() == Some("rebuild") {
        return Ok(ExitCode::from(rebuild(root.as_ref(), stdin, &mut stdout)));
    }
    if verb.as_deref() == Some("inflate") {
        return Ok(ExitCode::from(inflate(stdin, &mut stdout)));
    }
    let job = read_job(&mut stdin)?;
    serve(&job, stdin, &mut stdout)?;
    Ok(ExitCode::SUCCESS)
}
