//! [`Unpacker`]: layers are inflated and unpacked by other processes, which may be confined.
//!
//! What is unpacked passes through this process, which takes its digest, bounds it, and looks at the disk: the diff id of a tree is
//! that of the bytes that were given to who unpacked it, whatever that or the inflating process was made to do.

mod worker;

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use self::worker::{Patience, Worker, blame};
use crate::Digest;
use crate::compression::{Compression, compression};
use crate::unpack::job::{
    ANSWER_BYTES_MAX, Answer, INFLATE_DAMAGED, Job, Outcome, PIECE, set_opaque, write_job,
    write_trees,
};
use crate::unpack::stream::{Counted, Guarded, bomb};
use crate::unpack::{UnpackError, Unpacked};

/// More notes than the unpacker of this crate makes.
const NOTES_MAX: usize = 32;

/// A program that does one [`Job`] and ends: it is given arguments, the store's root and the job's target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacker {
    /// Its path.
    pub program: PathBuf,
    /// Its first arguments to unpack: it reads [the job](crate::unpack::job::read_job) and the uncompressed layer from standard
    /// input, and [answers](crate::unpack::job::serve) on standard output.
    pub arguments: Vec<OsString>,
    /// Its first arguments to [inflate](crate::unpack::job::inflate) from standard input to standard output.
    pub inflate: Vec<OsString>,
    /// Its first arguments to [make a layer of a delta](crate::unpack::job::rebuild), from standard input to standard output.
    pub rebuild: Vec<OsString>,
    /// How long it may take for one piece of the blob, or for the end of the layer, before it is killed as hung.
    pub patience: Duration,
}

/// What is handed on from one process to the other.
struct Passage<'p> {
    job: &'p Job,
    /// Bytes of the blob.
    consumed: &'p AtomicU64,
    unpacking: &'p Patience,
}

impl Unpacker {
    pub(super) fn perform(&self, root: &Path, job: Job, mut blob: impl Read) -> Outcome {
        let unpacking = self.start(&self.arguments, root, &job)?;
        let mut head = Vec::new();
        let read = Read::by_ref(&mut blob).take(4).read_to_end(&mut head);
        read.map_err(|source| self.unread(source))?;
        let through = match compression(&head) {
            Compression::None => None,
            Compression::Gzip | Compression::Zstd => Some(&self.inflate[..]),
        };
        let blob = io::Cursor::new(head).chain(blob);
        self.pass_through(root, job, unpacking, blob, through, 0)
    }

    /// As [`perform`](Self::perform), with a delta for old layers.
    pub(super) fn rebuild(
        &self,
        root: &Path,
        job: Job,
        delta: impl Read,
        trees: &[PathBuf],
    ) -> Outcome {
        let unpacking = self.start(&self.arguments, root, &job)?;
        let mut head = Vec::new();
        write_trees(root, trees, &mut head).map_err(|source| self.failed("start", source))?;
        let delta = io::Cursor::new(head).chain(delta);
        let through = Some(&self.rebuild[..]);
        // How long it is says nothing of what it makes of old files; the rest is bounded by who applies it.
        self.pass_through(root, job, unpacking, delta, through, u64::MAX / 2)
    }

    /// Has the blob unpacked, after a process started with the arguments `through` made a plain layer of it. `consumed` counts as
    /// bytes of the blob from the beginning.
    fn pass_through(
        &self,
        root: &Path,
        mut job: Job,
        mut unpacking: Worker,
        blob: impl Read,
        through: Option<&[OsString]>,
        consumed: u64,
    ) -> Outcome {
        job.opaque_later = true;
        let mut input = unpacking.input.take().expect("it is piped");
        // It may have had enough before the end; what it says counts then.
        let wrote = unpacking.patience.while_it(|| write_job(&job, &mut input));
        let passage = Passage {
            job: &job,
            consumed: &AtomicU64::new(consumed),
            unpacking: &unpacking.patience,
        };
        let passed = match through {
            _ if wrote.is_err() => None,
            None => passage
                .pass_on(Counted::new(blob, passage.consumed), input)
                .map_err(|source| self.unread(source))?,
            Some(arguments) => {
                let inflating = self.start(arguments, root, &job)?;
                self.inflated(&passage, inflating, blob, input)?
            }
        };
        let unpacked = self.answer(&mut unpacking, &job)?;
        match passed {
            Some(diff_id) => Ok((unpacked, diff_id)),
            None => Err(UnpackError::Crashed(
                "says that it is done before it was given all".to_owned(),
            )),
        }
    }

    fn start(&self, arguments: &[OsString], root: &Path, job: &Job) -> Result<Worker, UnpackError> {
        let mut command = Command::new(&self.program);
        command.args(arguments).arg(root).arg(&job.target);
        Worker::start(command, self.patience).map_err(|source| self.failed("start", source))
    }

    /// Inflates the blob into `output`; the digest of what came, or `None` when not all was taken.
    fn inflated(
        &self,
        passage: &Passage<'_>,
        mut inflating: Worker,
        blob: impl Read,
        output: ChildStdin,
    ) -> Result<Option<Digest>, UnpackError> {
        let mut input = inflating.input.take().expect("it is piped");
        let from: ChildStdout = inflating.output.take().expect("it is piped");
        let (fed, status, passed) = std::thread::scope(|scope| {
            let passing = scope.spawn(move || passage.pass_on(from, output));
            let mut blob = Counted::new(blob, passage.consumed);
            let fed = hand_on(&mut blob, &mut input, &inflating.patience);
            drop(input);
            if fed.is_err() {
                inflating.kill();
            }
            let status = inflating.wait();
            let passed = passing.join().expect("it does not panic");
            (fed, status, passed)
        });
        fed.map_err(|source| self.unread(source))?;
        let passed = passed.map_err(|source| match bomb(&source) {
            Some(bomb) => UnpackError::Bomb(*bomb),
            None => self.failed("read from", source),
        })?;
        let status = status.map_err(|source| self.failed("wait for", source))?;
        // Who takes no more has its reasons, and says them.
        if passed.is_some() && !status.success() {
            return Err(self.not_inflated(status, &inflating.patience));
        }
        Ok(passed)
    }

    fn not_inflated(&self, status: ExitStatus, patience: &Patience) -> UnpackError {
        if patience.is_lost() {
            return self.hung();
        }
        if status.code() == Some(INFLATE_DAMAGED.into()) {
            return UnpackError::Archive("its compression is damaged or cut off".into());
        }
        self.blame(status)
    }

    /// What was unpacked, as the process says.
    fn answer(&self, unpacking: &mut Worker, job: &Job) -> Result<Unpacked, UnpackError> {
        let output = unpacking.output.take().expect("it is piped");
        let answer = unpacking.patience.while_it(|| read_answer(output));
        let status = unpacking
            .wait()
            .map_err(|source| self.failed("wait for", source))?;
        match answer {
            Some(Answer::Done(unpacked))
                if unpacked.bytes > job.budget.bytes || unpacked.entries > job.budget.entries =>
            {
                let more = "says that it unpacked more than it may";
                Err(UnpackError::Crashed(more.to_owned()))
            }
            Some(Answer::Done(mut unpacked)) => {
                unpacked.notes.truncate(NOTES_MAX);
                let opaque = unpacked.opaque.get_or_insert_default();
                set_opaque(&job.target, opaque)
                    .map_err(|source| self.failed("make directories opaque for", source))?;
                Ok(*unpacked)
            }
            Some(Answer::Failed(failure)) => Err(failure.into()),
            None if unpacking.patience.is_lost() => Err(self.hung()),
            None => Err(self.blame(status)),
        }
    }

    fn hung(&self) -> UnpackError {
        UnpackError::Ended(format!(
            "took no bytes and gave no answer for {} s and was ended",
            self.patience.as_secs()
        ))
    }

    fn blame(&self, status: ExitStatus) -> UnpackError {
        blame(status).unwrap_or_else(|| {
            let ended = format!("it ended with {status} and without an answer");
            self.failed("have a layer unpacked by", io::Error::other(ended))
        })
    }

    fn failed(&self, act: &'static str, source: io::Error) -> UnpackError {
        UnpackError::Io {
            act: act.into(),
            path: self.program.display().to_string(),
            source,
        }
    }

    /// The blob could not be read, or it was a bomb.
    fn unread(&self, source: io::Error) -> UnpackError {
        match (bomb(&source), source.raw_os_error()) {
            (Some(bomb), _) => UnpackError::Bomb(*bomb),
            (None, Some(_)) => self.failed("read a layer for", source),
            (None, None) => UnpackError::Archive(Box::new(source)),
        }
    }
}

impl Passage<'_> {
    /// Hands an uncompressed layer on to who unpacks it: its digest, or `None` when not all was taken.
    ///
    /// # Errors
    /// Those of reading, and what bounds it.
    fn pass_on(&self, layer: impl Read, mut output: ChildStdin) -> io::Result<Option<Digest>> {
        let shortage = || self.job.shortage();
        let max = self.job.stream_bytes_max;
        let mut guarded = Guarded::new(layer, self.consumed, max, &shortage);
        let all = hand_on(&mut guarded, &mut output, self.unpacking)?;
        Ok(all.then(|| guarded.digest()))
    }
}

/// Hands all of it on; false when nobody takes it any more.
///
/// # Errors
/// Those of reading.
fn hand_on(from: &mut dyn Read, to: &mut dyn Write, patience: &Patience) -> io::Result<bool> {
    let mut buffer = vec![0; PIECE];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(count) => {
                let took = patience.while_it(|| to.write_all(&buffer[..count]));
                if took.is_err() {
                    return Ok(false);
                }
            }
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
