//! Fetching and unpacking images in a short-lived child process, so that its memory goes with it and a
//! pull that hangs can be killed.
//!
//! The parent ([`Staging`]) starts `foreshore-agent stage --config FILE IMAGE…` and reads what it prints:
//! one JSON object a line, [`Line`]. The child ([`run`]) has one thread and blocks; it dies with the agent
//! (prctl(2), `PR_SET_PDEATHSIG`), and the store sweeps what it leaves. Secrets with logins come to it on its standard
//! input ([`LOGINS`]): arguments and environment can be looked at.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use foreshore_images::registry::{Client, ClientConfig, DockerConfig, LoginsError};
use foreshore_images::store::{Progress, Store};
use foreshore_images::{Fault, Platform, Reference};
use foreshore_protocol::AppName;
use foreshore_protocol::id::SecretName;
use foreshore_protocol::message::{Reason, ReasonCode};
use foreshore_protocol::secret::{Secret, SecretValue};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::causes::chain;
use crate::config::Config;
use crate::images;
use crate::plan::BootId;

/// How often the child tells how far it is.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// A child that prints more than this in one line is not ours.
const LINE_BYTES_MAX: u64 = 16 * 1024;

/// The option that says that logins come on standard input.
pub const LOGINS: &str = "--logins";

/// More than the largest bundle of secrets becomes as JSON.
const LOGINS_BYTES_MAX: u64 = 1 << 20;

/// Between the agent's own and that of containers: what it does can be done again.
const STAGE_OOM_SCORE_ADJ: &str = "200";

/// What the child prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub enum Line {
    /// An image is begun.
    Planned {
        /// As it was asked for.
        image: String,
        /// Compressed bytes that are missing.
        bytes: u64,
    },
    /// More of it came.
    Fetched {
        /// Compressed bytes since it was begun.
        bytes: u64,
    },
    /// It is there.
    Staged,
    /// All images are there. The last line.
    Done,
    /// One image cannot be staged. The last line.
    Failed {
        /// Why.
        code: ReasonCode,
        /// For people.
        message: String,
    },
}

/// Where a device's image store is.
#[must_use]
pub fn store_path(config: &Config) -> PathBuf {
    config.paths.state.join("images")
}

/// Once in each boot: sets layers aside that a power cut has torn, and says which, for people. `run` is the run
/// directory, where it is noted that it was done.
#[must_use]
pub fn survey(store: &Store, run: &Path, boot: BootId) -> Vec<String> {
    let note = run.join("surveyed");
    if std::fs::read(&note).is_ok_and(|noted| noted == boot.0) {
        return Vec::new();
    }
    match store.survey() {
        Ok(torn) => {
            let made = std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(run);
            let noted = made.and_then(|()| std::fs::write(&note, boot.0));
            if let Err(error) = noted {
                tracing::debug!(%error, "layers will be looked at again");
            }
            torn.iter()
                .map(|layer| {
                    format!("layer {layer} was torn by a power cut; its images are fetched again")
                })
                .collect()
        }
        Err(error) => {
            tracing::warn!(error = chain(&error), "layers could not be looked at");
            Vec::new()
        }
    }
}

/// A staging under way. Dropping it kills the child.
#[derive(Debug)]
pub struct Staging {
    child: Child,
    output: BufReader<ChildStdout>,
    input: Option<(ChildStdin, SecretValue)>,
}

impl Staging {
    /// Starts the child. `logins` are secrets that hold docker's `config.json`; the first that has a login counts.
    ///
    /// # Errors
    ///
    /// When no process can be started.
    pub fn start(
        program: &Path,
        config: &Path,
        app: &AppName,
        images: &[String],
        logins: &[(SecretName, Secret)],
    ) -> std::io::Result<Self> {
        let (option, stdin) = match logins {
            [] => (None, Stdio::null()),
            _ => (Some(LOGINS), Stdio::piped()),
        };
        let mut child = Command::new(program)
            .arg("stage")
            .arg("--config")
            .arg(config)
            .arg("--app")
            .arg(app.as_str())
            .args(option)
            .arg("--")
            .args(images)
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()?;
        let output = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let input = child.stdin.take().map(|stdin| (stdin, written(logins)));
        Ok(Self {
            child,
            output,
            input,
        })
    }

    /// Waits for the end; `progress` is told what the child says before it.
    ///
    /// Cancel safe in that dropping the future and the staging kills the child; it cannot be resumed.
    ///
    /// # Errors
    ///
    /// With the reason when an image could not be staged.
    pub async fn finish(mut self, mut progress: impl FnMut(Line)) -> Result<(), Reason> {
        if let Some((mut stdin, logins)) = self.input.take() {
            // The child reads them before it says anything; one that ended says so below.
            let _ended = stdin.write_all(logins.expose()).await;
        }
        let mut end = None;
        loop {
            let mut line = Vec::new();
            let read = (&mut self.output)
                .take(LINE_BYTES_MAX)
                .read_until(b'\n', &mut line)
                .await;
            if !matches!(read, Ok(count) if count > 0) {
                break;
            }
            match serde_json::from_slice(&line) {
                Ok(line @ (Line::Planned { .. } | Line::Fetched { .. } | Line::Staged)) => {
                    progress(line);
                }
                Ok(Line::Done) => end = Some(Ok(())),
                Ok(Line::Failed { code, message }) => end = Some(Err(reason(code, &message))),
                Err(_) => break,
            }
        }
        drop(self.output);
        match (end, self.child.wait().await) {
            (Some(end), Ok(_)) => end,
            (_, Ok(status)) => Err(reason(
                ReasonCode::Internal,
                &format!("staging ended with {status} and no result"),
            )),
            (_, Err(error)) => Err(reason(
                ReasonCode::Internal,
                &format!("staging could not be waited for: {error}"),
            )),
        }
    }
}

/// How the child is told them.
fn written(logins: &[(SecretName, Secret)]) -> SecretValue {
    let texts: Vec<(&SecretName, &[u8])> = logins
        .iter()
        .map(|(name, secret)| (name, secret.value.expose()))
        .collect();
    SecretValue::new(serde_json::to_vec(&texts).expect("names and bytes serialize"))
}

/// Reads what [`written`] made from standard input.
fn read_logins() -> Result<Vec<(SecretName, SecretValue)>, (Fault, String)> {
    let mut bytes = Vec::new();
    let mut input = std::io::stdin().lock().take(LOGINS_BYTES_MAX);
    let read = input.read_to_end(&mut bytes);
    let text = SecretValue::new(bytes);
    let lost = || (Fault::Internal, "the logins did not come whole".to_owned());
    read.map_err(|_| lost())?;
    // Its error would quote what it found.
    serde_json::from_slice(text.expose()).map_err(|_| lost())
}

/// Gives a client the logins of secrets; what the device is configured with stays.
fn log_in(
    client: &mut ClientConfig,
    logins: &[(SecretName, SecretValue)],
) -> Result<(), (SecretName, LoginsError)> {
    for (name, text) in logins {
        DockerConfig::logins(text.expose())
            .map_err(|error| (name.clone(), error))?
            .fill(client);
    }
    Ok(())
}

/// The child: stages `images` one after the other and prints [`Line`]s. First it sees to the signatures that the policy
/// wants of images of `app`. With `logins`, secrets come on standard input. Call it before any thread exists.
#[must_use]
pub fn run(config: &Config, app: Option<&AppName>, images: &[String], logins: bool) -> ExitCode {
    // A pull nobody waits for any more would only hold the store's lock.
    let _harmless_if_refused = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    // Of all that belongs to the agent this is missed least when the device runs out of memory.
    let _tried_again_with_backoff = std::fs::write("/proc/self/oom_score_adj", STAGE_OOM_SCORE_ADJ);
    if nobody_listens() {
        // The agent was gone before it could take this process along.
        return ExitCode::FAILURE;
    }
    let logins = if logins {
        read_logins()
    } else {
        Ok(Vec::new())
    };
    match logins.and_then(|logins| stage(config, app, images, &logins)) {
        Ok(()) => {
            print(&Line::Done);
            ExitCode::SUCCESS
        }
        Err((fault, message)) => {
            print(&Line::Failed {
                code: code(fault),
                message,
            });
            ExitCode::FAILURE
        }
    }
}

/// Whether standard output is a pipe that nobody reads from (poll(2), `POLLERR`).
fn nobody_listens() -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd as _;
    let stdout = std::io::stdout();
    let mut asked = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    poll(&mut asked, PollTimeout::ZERO).is_ok()
        && asked[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLERR))
}

fn stage(
    config: &Config,
    app: Option<&AppName>,
    references: &[String],
    logins: &[(SecretName, SecretValue)],
) -> Result<(), (Fault, String)> {
    let mut client = config
        .registry_client()
        .map_err(|error| (Fault::Config, chain(&error)))?;
    log_in(&mut client, logins).map_err(|(name, error)| {
        let message = format!("secret {name} cannot be used to pull images: {error}");
        (Fault::Config, message)
    })?;
    let client = Client::new(client).map_err(|error| (Fault::Config, chain(&error)))?;
    let store = images::open(config).map_err(|error| (error.fault(), chain(&error)))?;
    let policy = config.policy_source().load();
    let policy = policy.map_err(|error| (Fault::Config, chain(&error)))?;
    for image in in_order(references) {
        let reference = Reference::parse(image)
            .map_err(|error| (Fault::BadImage, format!("{image}: {}", chain(&error))))?;
        let demands = policy.demands(app, &reference.name());
        if !demands.is_empty() {
            store
                .prove(&client, &reference, &demands)
                .map_err(|error| (error.fault(), chain(&error)))?;
        }
        let (mut fetched, mut told) = (0_u64, Instant::now());
        let mut progress = |progress: Progress| match progress {
            Progress::Planned { bytes, .. } => print(&Line::Planned {
                image: image.clone(),
                bytes,
            }),
            Progress::Fetched { bytes } => {
                fetched = fetched.saturating_add(bytes);
                if told.elapsed() >= TELL_EVERY {
                    told = Instant::now();
                    print(&Line::Fetched { bytes: fetched });
                }
            }
            Progress::Unpacked { .. } => {}
        };
        store
            .stage(&client, &reference, &Platform::host(), &mut progress)
            .map_err(|error| (error.fault(), chain(&error)))?;
        print(&Line::Staged);
    }
    Ok(())
}

/// The images of a release in the order in which they are staged, each once.
#[must_use]
pub fn in_order(images: &[String]) -> BTreeSet<&String> {
    images.iter().collect()
}

fn print(line: &Line) {
    let mut text = serde_json::to_vec(line).expect("lines serialize");
    text.push(b'\n');
    // The agent may be gone; then nobody needs to know.
    let _nobody_reads = std::io::stdout().lock().write_all(&text);
}

fn reason(code: ReasonCode, message: &str) -> Reason {
    let mut message = message.to_owned();
    message.truncate(message.floor_char_boundary(512));
    Reason {
        code,
        service: None,
        message,
    }
}

const fn code(fault: Fault) -> ReasonCode {
    match fault {
        Fault::NotFound => ReasonCode::ImageNotFound,
        Fault::Unreachable => ReasonCode::RegistryUnreachable,
        Fault::DigestMismatch => ReasonCode::DigestMismatch,
        Fault::NoMatchingPlatform => ReasonCode::NoMatchingPlatform,
        Fault::BadImage => ReasonCode::BadImage,
        Fault::Unsigned => ReasonCode::ImageUnsigned,
        Fault::DiskFull => ReasonCode::DiskFull,
        Fault::Deferred => ReasonCode::PullDeferred,
        Fault::Busy | Fault::Config | Fault::Internal => ReasonCode::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program in place of the child: prints what it is told to.
    fn child(dir: &Path, script: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = dir.join("child");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn finish(script: &str) -> (Result<(), Reason>, Vec<Line>) {
        finish_with(script, &[])
    }

    fn finish_with(
        script: &str,
        logins: &[(SecretName, Secret)],
    ) -> (Result<(), Reason>, Vec<Line>) {
        let dir = tempfile::tempdir().unwrap();
        let program = child(dir.path(), script);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut seen = Vec::new();
            let app = "web".parse().unwrap();
            let images = ["a".to_owned()];
            let staging =
                Staging::start(&program, Path::new("/none"), &app, &images, logins).unwrap();
            let end = tokio::time::timeout(
                Duration::from_secs(20),
                staging.finish(|line| seen.push(line)),
            );
            (end.await.unwrap(), seen)
        })
    }

    #[test]
    fn progress_and_end_are_read() {
        let (end, seen) = finish(
            r#"echo '{"line":"planned","image":"a","bytes":2}'; echo '{"line":"fetched","bytes":1}'
               echo '{"line":"staged"}'; echo '{"line":"done"}'"#,
        );
        let planned = Line::Planned {
            image: "a".to_owned(),
            bytes: 2,
        };
        let fetched = Line::Fetched { bytes: 1 };
        assert_eq!((end, seen), (Ok(()), vec![planned, fetched, Line::Staged]));
        let (end, _) =
            finish(r#"echo '{"line":"failed","code":"disk-full","message":"no room"}'; exit 1"#);
        assert_eq!(end, Err(reason(ReasonCode::DiskFull, "no room")));
    }

    fn secret(text: &[u8]) -> Secret {
        Secret {
            revision: 1,
            value: SecretValue::new(text.to_vec()),
        }
    }

    #[test]
    fn logins_come_on_standard_input_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let [input, seen] = ["input", "seen"].map(|name| dir.path().join(name));
        let script = format!(
            "cat > {}; {{ tr '\\0' ' ' < /proc/$$/cmdline; env; }} > {}; echo '{{\"line\":\"done\"}}'",
            input.display(),
            seen.display()
        );
        // As many and as large as they may be, and of bytes that take most room in JSON.
        let largest = [0xff; foreshore_protocol::secret::MAX_SECRET_BYTES];
        let logins: Vec<(SecretName, Secret)> = (0..foreshore_protocol::manifest::MAX_PULL_SECRETS)
            .map(|number| (format!("s{number}").parse().unwrap(), secret(&largest)))
            .chain([("last".parse().unwrap(), secret(b"hunter2"))])
            .collect();
        let (end, _) = finish_with(&script, &logins);
        assert_eq!(end, Ok(()));
        let text = std::fs::read(&input).unwrap();
        assert!((text.len() as u64) < LOGINS_BYTES_MAX);
        let read: Vec<(SecretName, SecretValue)> = serde_json::from_slice(&text).unwrap();
        assert_eq!(read.len(), logins.len());
        assert_eq!(read.last().unwrap().1.expose(), b"hunter2");
        let seen = std::fs::read_to_string(&seen).unwrap();
        assert!(seen.contains(LOGINS) && !seen.contains("hunter2"), "{seen}");
        // A child that reads none of it is no trouble.
        assert_eq!(
            finish_with("exit 1", &logins).0.unwrap_err().code,
            ReasonCode::Internal
        );
    }

    #[test]
    fn what_the_device_is_configured_with_counts_and_a_bad_secret_is_named() {
        let mut client = ClientConfig::default();
        let own = foreshore_images::registry::Credentials::new("own", "x");
        let registry = client.registries.entry("a.b".to_owned()).or_default();
        registry.credentials = Some(own.clone());
        let text = br#"{"auths": {"a.b": {"auth": "YTpi"}, "c.d": {"auth": "YTpi"}}}"#;
        let mut logins = vec![("login".parse().unwrap(), SecretValue::new(text.to_vec()))];
        log_in(&mut client, &logins).unwrap();
        assert_eq!(client.registries["a.b"].credentials, Some(own));
        assert!(client.registries["c.d"].credentials.is_some());
        logins.push((
            "bad".parse().unwrap(),
            SecretValue::new(b"hunter2".to_vec()),
        ));
        let (name, error) = log_in(&mut client, &logins).unwrap_err();
        assert_eq!(name.as_str(), "bad");
        assert!(!error.to_string().contains("hunter2"));
    }

    #[test]
    fn a_child_that_dies_or_talks_nonsense_is_a_failure() {
        for script in [
            "exit 0",
            "kill -9 $$",
            "echo nonsense; exit 0",
            "head -c 100000 /dev/zero",
        ] {
            let (end, _) = finish(script);
            assert_eq!(end.unwrap_err().code, ReasonCode::Internal, "{script}");
        }
    }
}
