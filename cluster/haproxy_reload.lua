-- Certificates of the faces, read again when their files change. Connections that are open keep
-- what they were shown; the next handshake shows the new one. What HAProxy does not take leaves the
-- old certificate in use, and is tried again once the files have changed again.

local admin_socket, period_s, pem, client_ca, client_crl = ...
local key = pem .. ".key"
local TIMEOUT_S = 5

local function read(path)
  local file = io.open(path, "rb")
  if not file then
    return nil
  end
  local text = file:read("a")
  file:close()
  return text
end

-- Whether a command of the admin socket did what it should, and what it answered.
local function ask(command, success)
  local socket = core.tcp()
  socket:settimeout(TIMEOUT_S)
  if not socket:connect("unix@" .. admin_socket) then
    return false, "the admin socket does not answer"
  end
  socket:send(command .. "\n")
  local answer = socket:receive("*a") or ""
  socket:close()
  return answer:find(success, 1, true) ~= nil, answer
end

-- All parts are taken, or none. Each is a command and its PEM, of 16 KiB at most; an empty line
-- would end it.
local function transact(what, parts)
  local done, answer = false, "holds nothing in PEM"
  for _, part in ipairs(parts) do
    local text = part.text:gsub("\r", ""):gsub("\n\n+", "\n"):gsub("^\n", "")
    done, answer = ask(part.command .. " <<\n" .. text .. "\n", "ransaction")
    if not done then
      break
    end
  end
  if done then
    done, answer = ask("commit " .. what, "Success")
  end
  if done then
    core.Info("read again: " .. what)
  else
    ask("abort " .. what, "")
    core.Warning("kept as it was: " .. what .. ": " .. answer)
  end
end

-- In this order: a certificate that is set forgets its key.
local function pair()
  local certificate_text, key_text = read(pem), read(key)
  if certificate_text and key_text then
    return {
      { command = "set ssl cert " .. pem, text = certificate_text },
      { command = "set ssl cert " .. key, text = key_text },
    }
  end
end

local function authorities()
  local parts, command = {}, "set"
  for certificate in (read(client_ca) or ""):gmatch("%-%-%-%-%-BEGIN.-%-%-%-%-%-END[^\n]*") do
    table.insert(parts, { command = command .. " ssl ca-file " .. client_ca, text = certificate })
    command = "add"
  end
  return parts
end

-- In one part, as nothing can be added to a list.
local function revoked()
  local text = read(client_crl)
  return text and { { command = "set ssl crl-file " .. client_crl, text = text } }
end

local function joined(parts)
  local texts = {}
  for _, part in ipairs(parts or {}) do
    table.insert(texts, part.text)
  end
  return table.concat(texts, "\n")
end

local watched = { { what = "ssl cert " .. pem, read = pair } }
if client_ca then
  table.insert(watched, { what = "ssl ca-file " .. client_ca, read = authorities })
end
if client_crl then
  table.insert(watched, { what = "ssl crl-file " .. client_crl, read = revoked })
end
for _, files in ipairs(watched) do
  files.before = joined(files.read())
end

core.register_task(function()
  while true do
    core.sleep(tonumber(period_s))
    for _, files in ipairs(watched) do
      local parts = files.read()
      local now = joined(parts)
      if parts and now ~= files.before then
        files.before = now
        transact(files.what, parts)
      end
    end
  end
end)
