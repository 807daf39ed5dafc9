//! The configuration and the secrets that it names.

use super::quoted;
use crate::doctor::facts::{ConfigProblem, Facts, SecretFile};
use crate::doctor::finding::{Check, CheckId};

pub(super) fn file(facts: &Facts) -> Check {
    let id = CheckId::ConfigFile;
    let config = &facts.config;
    let path = quoted(&config.path);
    match &config.read {
        Err(ConfigProblem::Missing) => Check::error(
            id,
            format!("there is no {path}; the defaults are looked at below"),
            format!(
                "write it, beginning with the sample configs/agent.toml that comes with Foreshore; it needs a name for the device, the hub's address and a token: printf 'device = \"NAME\"\\n[hub]\\nbroker = \"mqtt://HUB:1883\"\\njoin_token_file = \"/etc/foreshore/join-token\"\\n' > {path}"
            ),
        ),
        Err(ConfigProblem::Wrong(why)) => Check::error(
            id,
            format!("{why}; the defaults are looked at below"),
            format!(
                "correct that line in {path}, then: foreshore-agent check-config --config {path}"
            ),
        ),
        Ok(()) => match config.mode {
            Some(mode) if mode & 0o022 != 0 => Check::warning(
                id,
                format!(
                    "others than its owner may write {path} (mode {mode:04o}), and with it run what they like as root"
                ),
                format!("chmod go-w {path}"),
            ),
            _ => Check::ok(id, path),
        },
    }
}

pub(super) fn secrets(facts: &Facts) -> Check {
    let id = CheckId::ConfigSecrets;
    if facts.config.read.is_err() {
        return Check::info(id, "not looked at: the configuration names them");
    }
    let unusable = facts
        .secrets
        .iter()
        .find_map(|file| Some((file, file.problem.as_ref()?)));
    if let Some((file, problem)) = unusable {
        return Check::error(id, format!("{}: {problem}", file.key), fill(file));
    }
    let open: Vec<&SecretFile> = facts.secrets.iter().filter(|file| is_open(file)).collect();
    if open.is_empty() {
        let count = facts.secrets.len();
        return Check::ok(id, format!("{count} read, and by nobody but root"));
    }
    let paths: Vec<String> = open.iter().map(|file| quoted(&file.path)).collect();
    let found: Vec<String> = open
        .iter()
        .map(|file| {
            let (mode, uid) = file.owner.unwrap_or_default();
            format!("{} (mode {mode:04o}, owner {uid})", file.path.display())
        })
        .collect();
    let paths = paths.join(" ");
    Check::warning(
        id,
        format!("others than root can read {}", found.join(", ")),
        format!("chown root {paths} && chmod 600 {paths}"),
    )
}

fn is_open(file: &SecretFile) -> bool {
    file.owner
        .is_some_and(|(mode, uid)| mode & 0o077 != 0 || uid != 0)
}

fn fill(file: &SecretFile) -> String {
    let path = quoted(&file.path);
    let what = if file.key == "hub.join_token_file" {
        "copy join-token from the hub's data directory (/var/lib/foreshore-hub/join-token) there, one line"
    } else {
        "write the registry's password there, one line"
    };
    format!("{what}: install -m 600 -o root /dev/stdin {path}")
}
