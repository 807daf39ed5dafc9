//! Log files of services that are not here any more.

use std::collections::BTreeSet;
use std::path::Path;
use std::{fs, io};

use foreshore_protocol::{AppName, ServiceName};

/// Removes the log files below `root` (`APP/SERVICE.log`, `APP/SERVICE.log.N`) of all services but these. Files that
/// are not named like logs stay.
pub(super) fn remove_others(root: &Path, keep: &BTreeSet<(AppName, ServiceName)>) {
    for app in super::names(root) {
        let Ok(name) = app.parse::<AppName>() else {
            continue;
        };
        let dir = root.join(&app);
        for file in super::names(&dir) {
            let service = file.split_once(".log").map(|(service, _)| service.parse());
            let Some(Ok(service)) = service else {
                continue;
            };
            if !keep.contains(&(name.clone(), service)) {
                tell(&dir.join(&file), fs::remove_file(dir.join(&file)));
            }
        }
        match fs::remove_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            removed => tell(&dir, removed),
        }
    }
}

fn tell(path: &Path, removed: io::Result<()>) {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "old logs could not be removed");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_logs_of_services_that_are_gone_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            "shop/web.log",
            "shop/web.log.1",
            "shop/web-2.log",
            "shop/db.log.2",
            "old/web.log",
            "old2/web.log",
            "old2/notes.txt",
            "not an app/web.log",
        ];
        for file in files {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let keep = [("shop".parse().unwrap(), "web".parse().unwrap())].into();
        remove_others(dir.path(), &keep);
        let left: Vec<_> = files
            .into_iter()
            .filter(|file| dir.path().join(file).exists())
            .collect();
        assert_eq!(
            left,
            [
                "shop/web.log",
                "shop/web.log.1",
                "old2/notes.txt",
                "not an app/web.log"
            ]
        );
        assert!(!dir.path().join("old").exists());
        remove_others(&dir.path().join("missing"), &keep);
    }
}
