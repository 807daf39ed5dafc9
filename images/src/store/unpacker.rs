//! [`Unpacker`]: layers are unpacked by another process, which may be confined.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::unpack::UnpackError;
use crate::unpack::job::{ANSWER_BYTES_MAX, Answer, Job, Outcome, set_opaque, write_job};

/// A program that does one [`Job`] and ends: it is given `arguments` and the store's root, reads
/// [the job](crate::unpack::job::read_job) and the blob from standard input, and
/// [answers](crate::unpack::job::serve) on standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacker {
    /// Its path.
    pub program: PathBuf,
    /// What stands before the store's root and the job's target.
    pub arguments: Vec<OsString>,
}

/// Ends the process if nobody has waited for it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _it_may_have_ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Unpacker {
    pub(super) fn perform(&self, root: &Path, mut job: Job, mut blob: impl Read) -> Outcome {
        job.opaque_later = true;
        let failed = |act: &'static str, source: io::Error| UnpackError::Io {
            act: act.into(),
            path: self.program.display().to_string(),
            source,
        };
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .arg(root)
            .arg(&job.target)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut running = Running(child.map_err(|source| failed("start", source))?);
        let mut input = running.0.stdin.take().expect("it is piped");
        let output = running.0.stdout.take().expect("it is piped");
        // It may have had enough before the end; what it says counts then.
        let fed = match write_job(&job, &mut input) {
            Ok(()) => feed(&mut blob, &mut input),
            Err(_) => Ok(()),
        };
        drop(input);
        if let Err(source) = fed {
            return Err(UnpackError::Archive(Box::new(source)));
        }
        let answer = read_answer(output);
        let status = running
            .0
            .wait()
            .map_err(|source| failed("wait for", source))?;
        match answer {
            Some(Answer::Done(unpacked, diff_id)) => {
                let opaque = unpacked.opaque.clone().unwrap_or_default();
                set_opaque(&job.target, &opaque)
                    .map_err(|source| failed("make directories opaque for", source))?;
                Ok((*unpacked, diff_id))
            }
            Some(Answer::Failed(failure)) => Err(failure.into()),
            None => Err(failed(
                "have a layer unpacked by",
                io::Error::other(format!("it ended with {status} and without an answer")),
            )),
        }
    }
}

/// Hands the blob on.
///
/// # Errors
/// Those of the blob; that nobody reads any more is none.
fn feed(blob: &mut dyn Read, input: &mut dyn Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match blob.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) if input.write_all(&buffer[..count]).is_err() => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn read_answer(output: ChildStdout) -> Option<Answer> {
    let mut text = Vec::new();
    output.take(ANSWER_BYTES_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}
