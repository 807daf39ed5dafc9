//! Whose files mosquitto's are.

use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::Path;

/// The account that distributions make for mosquitto, and that it falls to when it is started as root.
const MOSQUITTO: &str = "mosquitto";

/// The most of `/etc/passwd` that is read.
const PASSWD_MAX: u64 = 4 << 20;

/// Who is to own the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    /// `None` for an account that `/etc/passwd` does not know.
    pub(super) name: Option<String>,
    uid: u32,
    gid: u32,
}

impl Account {
    /// Gives a file or directory to this account, if it is not there yet.
    pub(super) fn own(&self, path: &Path) -> io::Result<()> {
        let metadata = std::fs::metadata(path)?;
        if metadata.uid() == self.uid {
            return Ok(());
        }
        chown(path, Some(self.uid), Some(self.gid))
    }
}

/// The account for the files in `directory`: mosquitto's if root owns it and mosquitto can reach it, else its owner.
pub(super) fn of(directory: &Path) -> io::Result<Account> {
    let metadata = std::fs::metadata(directory)?;
    let accounts = accounts()?;
    if metadata.uid() == 0
        && let Some(account) = accounts
            .iter()
            .find(|account| account.name.as_deref() == Some(MOSQUITTO))
        && reaches(account, directory)?
    {
        return Ok(account.clone());
    }
    let owner = accounts
        .into_iter()
        .find(|account| account.uid == metadata.uid());
    Ok(owner.unwrap_or_else(|| Account {
        name: None,
        uid: metadata.uid(),
        gid: metadata.gid(),
    }))
}

/// Whether an account may pass all directories above this one. Groups are left out: "no" is the safe answer.
fn reaches(account: &Account, directory: &Path) -> io::Result<bool> {
    for above in std::fs::canonicalize(directory)?.ancestors().skip(1) {
        let metadata = std::fs::metadata(above)?;
        let bit = if metadata.uid() == account.uid {
            0o100
        } else {
            0o001
        };
        if metadata.mode() & bit == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

fn accounts() -> io::Result<Vec<Account>> {
    let mut text = String::new();
    std::fs::File::open("/etc/passwd")?
        .take(PASSWD_MAX)
        .read_to_string(&mut text)?;
    Ok(text.lines().filter_map(parse).collect())
}

/// One line of passwd(5).
fn parse(line: &str) -> Option<Account> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    Some(Account {
        name: Some(name.to_owned()),
        uid,
        gid,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn lines_of_passwd_are_read_and_others_skipped() {
        let account = parse("mosquitto:x:103:106::/var/lib/mosquitto:/usr/sbin/nologin").unwrap();
        assert_eq!(
            account,
            Account {
                name: Some("mosquitto".to_owned()),
                uid: 103,
                gid: 106
            }
        );
        for line in [
            "",
            "#",
            "+::::::",
            ":x:1:2::",
            "a:x",
            "a:x:b:c:::",
            "a:x:99999999999:1::",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    /// A directory that only root enters, whatever the umask.
    fn private() -> tempfile::TempDir {
        tempfile::Builder::new()
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir()
            .unwrap()
    }

    #[test]
    fn a_directory_behind_a_closed_door_is_not_reached() {
        let dir = private();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let stranger = Account {
            name: Some("stranger".to_owned()),
            uid: 54321,
            gid: 54321,
        };
        assert!(!reaches(&stranger, &inner).unwrap(), "the door is closed");
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let above = std::fs::canonicalize(dir.path()).unwrap();
        let open = above
            .ancestors()
            .skip(1)
            .all(|above| std::fs::metadata(above).unwrap().permissions().mode() & 1 == 1);
        assert_eq!(reaches(&stranger, &inner).unwrap(), open);
    }

    #[test]
    fn what_is_not_reached_stays_with_its_owner() {
        let dir = private();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let account = of(&inner).unwrap();
        assert_eq!(account.uid, std::fs::metadata(&inner).unwrap().uid());
        account.own(&inner).unwrap();
    }
}
