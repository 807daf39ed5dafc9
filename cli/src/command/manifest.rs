//! Reading manifests from files and from standard input, bounded in size.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use foreshore_protocol::manifest::{self, MAX_MANIFEST_BYTES, ManifestError};
use serde::Serialize;

use crate::arguments::Files;
use crate::failure::{Failure, code};
use crate::output::printable;

/// A manifest that may be sent.
#[derive(Debug)]
pub(super) struct Manifest {
    pub(super) kind: manifest::Manifest,
    pub(super) bytes: Vec<u8>,
}

/// What is wrong with one file.
#[derive(Debug, Serialize)]
pub(super) struct Complaint {
    pub(super) file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) line: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) column: Option<u64>,
    pub(super) message: String,
}

impl std::fmt::Display for Complaint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:", printable(&self.file))?;
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, "{line}:{column}:")?;
        }
        write!(f, " {}", printable(&self.message))
    }
}

/// Reads and checks one file; `-` is standard input.
pub(super) fn read(file: &Path) -> Result<Manifest, Complaint> {
    let name = if file == Path::new("-") {
        "<stdin>".to_owned()
    } else {
        file.display().to_string()
    };
    let complain = |message: String| Complaint {
        file: name.clone(),
        line: None,
        column: None,
        message,
    };
    let bytes = load(file).map_err(|error| complain(format!("cannot be read: {error}")))?;
    if bytes.len() > MAX_MANIFEST_BYTES {
        // Only so much was read that the true size is not known.
        return Err(complain(format!(
            "has more than {MAX_MANIFEST_BYTES} bytes; a manifest has fewer"
        )));
    }
    match manifest::parse_any(&bytes) {
        Ok(kind) => Ok(Manifest { kind, bytes }),
        Err(ManifestError::Syntax {
            line,
            column,
            message,
        }) if line > 0 => Err(Complaint {
            file: name,
            line: Some(line),
            column: Some(column),
            message,
        }),
        Err(error) => Err(complain(error.to_string())),
    }
}

/// Reads all files, or prints what is wrong with each and fails with exit code 2.
pub(super) fn read_all(files: &Files) -> Result<Vec<Manifest>, Failure> {
    let (mut good, mut wrong) = (Vec::new(), false);
    for file in &files.files {
        match read(file) {
            Ok(manifest) => good.push(manifest),
            Err(complaint) => {
                eprintln!("{complaint}");
                wrong = true;
            }
        }
    }
    if wrong {
        Err(Failure::reported(code::INPUT))
    } else {
        Ok(good)
    }
}

/// One byte more than may be parsed, so that the parser sees that it is too much.
fn load(file: &Path) -> io::Result<Vec<u8>> {
    let limit = u64::try_from(MAX_MANIFEST_BYTES)
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    let mut bytes = Vec::new();
    if file == Path::new("-") {
        io::stdin().lock().take(limit).read_to_end(&mut bytes)?;
    } else {
        File::open(file)?.take(limit).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}
