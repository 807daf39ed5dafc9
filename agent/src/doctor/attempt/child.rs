//! The child's side: one try, told in lines of JSON.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;

use super::{Said, hub, registry, shim, state};
use crate::causes::chain;
use crate::doctor::facts::Namespace;
use crate::runtime::device_filter;
use crate::runtime::seccomp::Filter;

/// Runs the hidden subcommand with the arguments after its name. Must be called before any thread exists.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let arguments: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
    let words: Vec<Option<&str>> = arguments.iter().map(|word| word.to_str()).collect();
    match (words.as_slice(), arguments.as_slice()) {
        ([Some("namespace"), Some(name)], _) => {
            let Some(kind) = Namespace::ALL.into_iter().find(|kind| kind.name() == *name) else {
                return ExitCode::from(2);
            };
            die_with_the_doctor();
            say_tried(unshare(flag(kind)).map_err(io::Error::from));
        }
        ([Some("seccomp")], _) => {
            die_with_the_doctor();
            let filtered = nix::sys::prctl::set_no_new_privs()
                .map_err(io::Error::from)
                .and_then(|()| Filter::new().install());
            say_tried(filtered);
        }
        ([Some("device-filter")], _) => {
            die_with_the_doctor();
            say_tried(device_filter::try_it());
        }
        ([Some("shim")], _) => {
            die_with_the_doctor();
            let why = Some(shim::become_it());
            say(&Said::Tried { why });
        }
        // Not to die with the doctor: it cleans up after itself.
        ([Some("state"), _], [_, dir]) => state::examine(Path::new(dir)),
        ([Some("hub"), _], [_, config]) => {
            die_with_the_doctor();
            hub::examine(Path::new(config));
        }
        ([Some("registry"), _, Some(host)], [_, config, _]) => {
            die_with_the_doctor();
            registry::examine(Path::new(config), host);
        }
        _ => return ExitCode::from(2),
    }
    ExitCode::SUCCESS
}

/// prctl(2), `PR_SET_PDEATHSIG`: nobody would read what it finds.
fn die_with_the_doctor() {
    let _harmless_if_refused = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
}

const fn flag(kind: Namespace) -> CloneFlags {
    match kind {
        Namespace::Mount => CloneFlags::CLONE_NEWNS,
        Namespace::Pid => CloneFlags::CLONE_NEWPID,
        Namespace::Network => CloneFlags::CLONE_NEWNET,
        Namespace::Ipc => CloneFlags::CLONE_NEWIPC,
        Namespace::Uts => CloneFlags::CLONE_NEWUTS,
        Namespace::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        Namespace::User => CloneFlags::CLONE_NEWUSER,
    }
}

fn say_tried(result: io::Result<()>) {
    say(&Said::Tried {
        why: result.err().map(|error| chain(&error)),
    });
}

/// Prints one line. The doctor may be gone; then nobody needs to know.
pub(super) fn say(said: &Said) {
    let mut line = serde_json::to_vec(said).expect("lines serialize");
    line.push(b'\n');
    let mut out = io::stdout().lock();
    let _nobody_reads = out.write_all(&line).and_then(|()| out.flush());
}
