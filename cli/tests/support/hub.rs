//! A fake hub: answers requests from a script and records what it was asked.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

/// What the fake hub was asked.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// `GET /api/v1/devices`.
    pub(crate) line: String,
    /// Header lines in lower case.
    pub(crate) headers: Vec<String>,
    /// Its body, chunks put together.
    pub(crate) body: Vec<u8>,
}

/// A scripted answer: status line rest, content type, body.
#[derive(Debug, Clone)]
pub(crate) struct Answer(pub(crate) u16, pub(crate) &'static str, pub(crate) String);

impl Answer {
    /// 200 with JSON.
    pub(crate) fn json(body: impl Into<String>) -> Self {
        Self(200, "application/json", body.into())
    }

    /// The connection ends without an answer.
    pub(crate) fn hang_up() -> Self {
        Self(0, "", String::new())
    }

    /// A problem.
    pub(crate) fn problem(status: u16, code: &str, detail: &str) -> Self {
        let body = format!(
            r#"{{"type":"https://foreshore.dev/problems/{code}","title":"t","status":{status},"detail":"{detail}","code":"{code}"}}"#
        );
        Self(status, "application/problem+json", body)
    }
}

/// The fake hub.
#[derive(Debug)]
pub(crate) struct FakeHub {
    /// Where it listens.
    pub(crate) url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl FakeHub {
    /// Starts one that gives these answers in turn, one per connection, then 500.
    pub(crate) fn start(answers: Vec<Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let mut answers = VecDeque::from(answers);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let answer = answers.pop_front();
                serve(
                    stream.unwrap(),
                    &log,
                    answer.unwrap_or_else(|| Answer(500, "text/plain", "no more answers".into())),
                );
            }
        });
        Self { url, asked }
    }

    /// What it was asked so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// `foreshore` with this hub and a token in the environment.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = foreshore(line);
        command
            .env("FORESHORE_HUB", &self.url)
            .env("FORESHORE_TOKEN", "secret-1");
        command
    }

    /// Runs `foreshore` to its end.
    pub(crate) fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }
}

/// `foreshore` with words of `line`, and no environment that could point it to a real hub.
pub(crate) fn foreshore(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foreshore"));
    command
        .args(line.split_whitespace())
        .env_remove("FORESHORE_HUB")
        .env_remove("FORESHORE_TOKEN")
        .env_remove("FORESHORE_TOKEN_FILE")
        .env_remove("FORESHORE_CA_FILE")
        .stdin(Stdio::null());
    command
}

fn serve(stream: TcpStream, log: &Mutex<Vec<Asked>>, answer: Answer) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let mut headers = Vec::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        if header.trim().is_empty() {
            break;
        }
        headers.push(header.trim().to_ascii_lowercase());
    }
    let body = read_body(&mut reader, &headers);
    log.lock().unwrap().push(Asked {
        line: line.trim().trim_end_matches(" HTTP/1.1").to_owned(),
        headers,
        body,
    });
    let Answer(status, kind, body) = answer;
    if status == 0 {
        return;
    }
    let mut stream = reader.into_inner();
    let length = body.len();
    // Without a length a stream ends when the connection does.
    let length = if kind == "text/event-stream" {
        String::new()
    } else {
        format!("content-length: {length}\r\n")
    };
    let head =
        format!("HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n{length}connection: close\r\n\r\n");
    let _client_may_be_gone = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(body.as_bytes()));
}

fn read_body(reader: &mut BufReader<TcpStream>, headers: &[String]) -> Vec<u8> {
    let value = |name: &str| headers.iter().find_map(|header| header.strip_prefix(name));
    let mut body = Vec::new();
    if let Some(length) = value("content-length: ") {
        body.resize(length.parse().unwrap(), 0);
        reader.read_exact(&mut body).unwrap();
    } else if value("transfer-encoding: ") == Some("chunked") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).unwrap();
            let size = usize::from_str_radix(size.trim(), 16).unwrap();
            let start = body.len();
            body.resize(start + size, 0);
            reader.read_exact(&mut body[start..]).unwrap();
            reader.read_line(&mut String::new()).unwrap();
            if size == 0 {
                break;
            }
        }
    }
    body
}

/// Standard output as text.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Standard error as text.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}
